// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The DRM node: a device file whose every operation goes to the Rust half. The DRM core gives it its place in /dev/dri and in
 * sysfs, and keeps its files; it sees none of the ioctls.
 */
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <drm/drm_file.h>

#include "pvgpu.h"

/* A flag of the protocol (protocol/src/wire.rs). */
#define PVGPU_OPEN_RDWR 2
#define PVGPU_OPEN_NONBLOCK 04000

/* After how long a reader looks again when the host had no room for the question whether there is something. */
#define PVGPU_LOOK_AGAIN msecs_to_jiffies(10)

/* --- the node --- */

/* One open of the node. */
struct pvgpu_opened {
	struct pvgpu_file file;
	wait_queue_head_t readable;	/* woken when the watch has happened */
	struct mutex watch_start;
	struct pvgpu_watch watch;
};

static void pvgpu_opened_happened(struct pvgpu_watch *watch, int result)
{
	wake_up_all(&container_of(watch, struct pvgpu_opened, watch)->readable);
}

static int pvgpu_open(struct drm_device *node, struct drm_file *drm_file)
{
	struct pvgpu *device = node->dev_private;
	struct pvgpu_opened *open = kzalloc(sizeof(*open), GFP_KERNEL);
	struct pvgpu_session *session;
	bool again = true;
	int object;

	if (!open)
		return -ENOMEM;
	for (;;) {
		session = pvgpu_session_now(device);
		if (IS_ERR(session)) {
			object = PTR_ERR(session);
			goto free;
		}
		/* No request of the host's waits for a read: whether this file's reader does is decided here. */
		object = pvgpu_rust_open(session, session->host, PVGPU_OPEN_RDWR | PVGPU_OPEN_NONBLOCK);
		if (object >= 0)
			break;
		/* That the host has lost the session is often noticed here first. */
		again = again && (pvgpu_session_over(session) || READ_ONCE(session->lost));
		pvgpu_session_put(session);
		if (!again)
			goto free;
		again = false;
	}
	open->file.session = session;
	open->file.object = object;
	init_waitqueue_head(&open->readable);
	mutex_init(&open->watch_start);
	open->watch.happened = pvgpu_opened_happened;
	drm_file->driver_priv = &open->file;
	spin_lock_irq(&device->watch_lock);
	session->opens++;
	spin_unlock_irq(&device->watch_lock);
	return 0;
free:
	kfree(open);
	return object;
}

static void pvgpu_close(struct drm_device *node, struct drm_file *drm_file)
{
	struct pvgpu_file *file = drm_file->driver_priv;
	struct pvgpu_opened *open = container_of(file, struct pvgpu_opened, file);
	struct pvgpu_session *session = file->session;
	bool last;

	pvgpu_watch_cancel(session, &open->watch);
	pvgpu_rust_close(session, session->host, file->object);
	spin_lock_irq(&session->device->watch_lock);
	last = !--session->opens;
	spin_unlock_irq(&session->device->watch_lock);
	if (last)
		pvgpu_fence_forget_signaled(session);
	pvgpu_session_put(session);
	kfree(open);
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

	if (pvgpu_session_over(file->session))
		return -ENODEV;
	result = pvgpu_rust_ioctl(file->session, file->session->host, file->object, command, address);
	/* As the kernel's own drivers: the process's signal handler decides whether the call is made again (SA_RESTART). */
	return result == -EINTR && signal_pending(current) ? -ERESTARTSYS : result;
}

static int pvgpu_mmap(struct file *filp, struct vm_area_struct *vma)
{
	return pvgpu_map(pvgpu_file(filp), vma);
}

/* Whether there is something to read: events, or zero, and the waiters are woken when there is; or -errno. */
static int pvgpu_readable(struct pvgpu_opened *open)
{
	int result = mutex_lock_interruptible(&open->watch_start);

	if (result)
		return result;
	if (!pvgpu_watching(open->file.session->device, &open->watch))
		result = pvgpu_watch(&open->file, &open->watch, POLLIN | POLLRDNORM);
	mutex_unlock(&open->watch_start);
	return result;
}

static __poll_t pvgpu_poll(struct file *filp, poll_table *table)
{
	struct pvgpu_opened *open = container_of(pvgpu_file(filp), struct pvgpu_opened, file);
	int result;

	poll_wait(filp, &open->readable, table);
	result = pvgpu_readable(open);
	/* The caller sees the signal itself. */
	if (result == -EINTR || result == -ERESTARTSYS)
		return 0;
	/* The host has no room for the question now: let the caller try to read, and ask again. */
	if (result == -EAGAIN || result == -ENOMEM)
		return EPOLLIN | EPOLLRDNORM;
	if (result < 0)
		return result == -ENODEV ? EPOLLERR | EPOLLHUP : EPOLLERR;
	return demangle_poll(result);
}

static ssize_t pvgpu_read(struct file *filp, char __user *buffer, size_t length, loff_t *offset)
{
	struct pvgpu_file *file = pvgpu_file(filp);
	struct pvgpu_opened *open = container_of(file, struct pvgpu_opened, file);
	int result;

	for (;;) {
		result = pvgpu_rust_read(file->session, file->session->host, file->object, (u64)buffer, length);
		if (result != -EAGAIN || filp->f_flags & O_NONBLOCK)
			break;
		result = pvgpu_readable(open);
		if (!result)
			result = wait_event_interruptible(open->readable,
							  !pvgpu_watching(file->session->device, &open->watch));
		else if (result == -EAGAIN || result == -ENOMEM)
			result = schedule_timeout_interruptible(PVGPU_LOOK_AGAIN) ? -EINTR : 0;
		if (result < 0)
			break;
	}
	/* Who polls for edges (EPOLLET) does not ask again before the next one. */
	if ((result >= 0 || result == -EAGAIN) && waitqueue_active(&open->readable) && pvgpu_readable(open) > 0)
		wake_up_all(&open->readable);
	return result == -EINTR && signal_pending(current) ? -ERESTARTSYS : result;
}

static const struct file_operations pvgpu_node_operations = {
	.owner = THIS_MODULE,
	.open = drm_open,
	.release = drm_release,
	.unlocked_ioctl = pvgpu_ioctl,
	.mmap = pvgpu_mmap,
	.poll = pvgpu_poll,
	.read = pvgpu_read,
	.llseek = noop_llseek,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	.fop_flags = FOP_UNSIGNED_OFFSET,
#endif
};

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
