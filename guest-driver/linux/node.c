// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The DRM node: a device file whose every operation goes to the Rust half. The DRM core gives it its place in /dev/dri and in
 * sysfs, and keeps its files; it sees none of the ioctls.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <drm/drm_file.h>

#include "pvgpu.h"

/* A flag of the protocol (protocol/src/wire.rs). */
#define PVGPU_OPEN_RDWR 2

/* --- files of objects that an ioctl gave --- */

static int pvgpu_object_mmap(struct file *filp, struct vm_area_struct *vma)
{
	return pvgpu_map(filp->private_data, vma);
}

static int pvgpu_object_release(struct inode *inode, struct file *filp)
{
	struct pvgpu_file *file = filp->private_data;

	pvgpu_rust_close(file->device, file->device->host, file->object);
	drm_dev_put(file->device->node);
	kfree(file);
	return 0;
}

static const struct file_operations pvgpu_object_operations = {
	.owner = THIS_MODULE,
	.mmap = pvgpu_object_mmap,
	.release = pvgpu_object_release,
	.llseek = noop_llseek,
};

int pvgpu_object_fd(struct pvgpu *device, int object, int descriptor)
{
	struct pvgpu_file *file = kzalloc(sizeof(*file), GFP_KERNEL);
	int fd = -ENOMEM;

	if (file) {
		file->device = device;
		file->object = object;
		drm_dev_get(device->node);
		fd = anon_inode_getfd("pvgpu", &pvgpu_object_operations, file, O_RDWR | O_CLOEXEC);
		if (fd < 0) {
			drm_dev_put(device->node);
			kfree(file);
		}
	}
	if (fd < 0)
		pvgpu_rust_close(device, device->host, object);
	return fd;
}

/* --- the node --- */

static int pvgpu_open(struct drm_device *node, struct drm_file *drm_file)
{
	struct pvgpu *device = node->dev_private;
	struct pvgpu_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	file->device = device;
	file->object = pvgpu_rust_open(device, device->host, PVGPU_OPEN_RDWR);
	if (file->object < 0) {
		int error = file->object;

		kfree(file);
		return error;
	}
	drm_file->driver_priv = file;
	return 0;
}

static void pvgpu_close(struct drm_device *node, struct drm_file *drm_file)
{
	struct pvgpu_file *file = drm_file->driver_priv;

	pvgpu_rust_close(file->device, file->device->host, file->object);
	kfree(file);
}

static struct pvgpu_file *pvgpu_file(struct file *filp)
{
	struct drm_file *drm_file = filp->private_data;

	return drm_file->driver_priv;
}

static long pvgpu_ioctl(struct file *filp, unsigned int command, unsigned long address)
{
	struct pvgpu_file *file = pvgpu_file(filp);
	int result;

	if (pvgpu_gone(file->device))
		return -ENODEV;
	result = pvgpu_rust_ioctl(file->device, file->device->host, file->object, command, address);
	/* As the kernel's own drivers: the process's signal handler decides whether the call is made again (SA_RESTART). */
	return result == -EINTR && signal_pending(current) ? -ERESTARTSYS : result;
}

static int pvgpu_mmap(struct file *filp, struct vm_area_struct *vma)
{
	return pvgpu_map(pvgpu_file(filp), vma);
}

static const struct file_operations pvgpu_node_operations = {
	.owner = THIS_MODULE,
	.open = drm_open,
	.release = drm_release,
	.unlocked_ioctl = pvgpu_ioctl,
	.mmap = pvgpu_mmap,
	.llseek = noop_llseek,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	.fop_flags = FOP_UNSIGNED_OFFSET,
#endif
};

int pvgpu_fd_object(struct pvgpu *device, int fd)
{
	struct file *filp = fget(fd);
	struct pvgpu_file *file = NULL;
	int object = -EBADF;

	if (!filp)
		return -EBADF;
	if (filp->f_op == &pvgpu_node_operations)
		file = pvgpu_file(filp);
	else if (filp->f_op == &pvgpu_object_operations)
		file = filp->private_data;
	if (file && file->device == device)
		object = file->object;
	fput(filp);
	return object;
}

/* The last file is closed and the device is gone. */
static void pvgpu_node_release(struct drm_device *node)
{
	pvgpu_free(node->dev_private);
}

int pvgpu_node_register(struct pvgpu *device)
{
	struct drm_driver *driver = &device->driver;
	struct drm_device *node;
	int error;

	driver->driver_features = DRIVER_RENDER;
	driver->open = pvgpu_open;
	driver->postclose = pvgpu_close;
	driver->fops = &pvgpu_node_operations;
	driver->name = device->identity.name;
	driver->desc = "pvgpu";
	driver->date = "0";
	driver->major = device->identity.version[0];
	driver->minor = device->identity.version[1];
	driver->patchlevel = device->identity.version[2];
	/* libdrm and Mesa know how to look at a platform device, but not at a virtio one. */
	device->parent = platform_device_register_data(&device->virtio->dev, "pvgpu", PLATFORM_DEVID_AUTO, NULL, 0);
	if (IS_ERR(device->parent))
		return PTR_ERR(device->parent);
	driver->release = pvgpu_node_release;
	node = drm_dev_alloc(driver, &device->parent->dev);
	if (IS_ERR(node)) {
		error = PTR_ERR(node);
		goto unregister;
	}
	node->dev_private = device;
	device->node = node;
	error = drm_dev_register(node, 0);
	if (!error)
		return 0;
unregister:
	platform_device_unregister(device->parent);
	return error;
}

void pvgpu_node_remove(struct pvgpu *device)
{
	struct drm_device *node = device->node;
	struct platform_device *parent = device->parent;

	drm_dev_unplug(node);
	platform_device_unregister(parent);
	drm_dev_put(node);
}
