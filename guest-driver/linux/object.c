// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The session's objects that ioctls give out as file descriptors, and take as such: each descriptor is what the kernel itself
 * would give, a dma-buf (buffer.c), a sync file (fence.c) or a syncobj file (here).
 */
#include <linux/anon_inodes.h>
#include <linux/fcntl.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "pvgpu.h"

static struct pvgpu_object *pvgpu_object_new(struct pvgpu_session *session, int id)
{
	struct pvgpu_object *object = kzalloc(sizeof(*object), GFP_KERNEL);

	if (!object)
		return NULL;
	object->file.session = pvgpu_session_get(session);
	object->file.object = id;
	kref_init(&object->references);
	drm_dev_get(session->device->node);
	return object;
}

struct pvgpu_object *pvgpu_object_get(struct pvgpu_object *object)
{
	kref_get(&object->references);
	return object;
}

static void pvgpu_object_release(struct kref *references)
{
	struct pvgpu_object *object = container_of(references, struct pvgpu_object, references);
	struct pvgpu_session *session = object->file.session;
	struct drm_device *node = session->device->node;

	pvgpu_rust_close(session, session->host, object->file.object);
	kfree(object);
	pvgpu_session_put(session);
	drm_dev_put(node);
}

void pvgpu_object_put(struct pvgpu_object *object)
{
	kref_put(&object->references, pvgpu_object_release);
}

/* --- syncobj files: good for being passed on and for being imported again, as the kernel's own --- */

static int pvgpu_syncobj_release(struct inode *inode, struct file *filp)
{
	pvgpu_object_put(filp->private_data);
	return 0;
}

static const struct file_operations pvgpu_syncobj_operations = {
	.owner = THIS_MODULE,
	.release = pvgpu_syncobj_release,
};

static struct file *pvgpu_syncobj_file(struct pvgpu_object *object)
{
	struct file *filp = anon_inode_getfile("syncobj_file", &pvgpu_syncobj_operations, object, 0);

	if (!IS_ERR(filp))
		pvgpu_object_get(object);
	return filp;
}

static struct pvgpu_object *pvgpu_syncobj_object(struct pvgpu_session *session, int fd)
{
	struct pvgpu_object *object = ERR_PTR(-EINVAL), *found;
	struct file *filp = fget(fd);

	if (!filp)
		return object;
	if (filp->f_op == &pvgpu_syncobj_operations) {
		found = filp->private_data;
		if (found->file.session == session)
			object = pvgpu_object_get(found);
	}
	fput(filp);
	return object;
}

/* --- for the Rust half --- */

int pvgpu_object_fd(struct pvgpu_session *session, int id, int descriptor, u32 flags)
{
	struct pvgpu_object *object = pvgpu_object_new(session, id);
	struct file *filp;
	int fd;

	if (!object) {
		pvgpu_rust_close(session, session->host, id);
		return -ENOMEM;
	}
	fd = get_unused_fd_flags(flags & O_CLOEXEC);
	if (fd < 0)
		goto put;
	switch (descriptor) {
	case PVGPU_DMA_BUF:
		filp = pvgpu_buffer_file(object, flags & O_ACCMODE);
		break;
	case PVGPU_SYNC_FILE:
		filp = pvgpu_fence_file(object);
		break;
	case PVGPU_SYNCOBJ:
		filp = pvgpu_syncobj_file(object);
		break;
	default:
		filp = ERR_PTR(-EOPNOTSUPP);
	}
	if (IS_ERR(filp)) {
		put_unused_fd(fd);
		fd = PTR_ERR(filp);
		goto put;
	}
	fd_install(fd, filp);
put:
	pvgpu_object_put(object);
	return fd;
}

int pvgpu_fd_object(struct pvgpu_session *session, int fd, int descriptor, struct pvgpu_object **object)
{
	struct pvgpu_object *found;

	switch (descriptor) {
	case PVGPU_DMA_BUF:
		found = pvgpu_buffer_object(session, fd);
		break;
	case PVGPU_SYNC_FILE:
		found = pvgpu_fence_object(session, fd);
		break;
	case PVGPU_SYNCOBJ:
		found = pvgpu_syncobj_object(session, fd);
		break;
	default:
		/* An eventfd would have to be signaled by the host. */
		found = ERR_PTR(-EOPNOTSUPP);
	}
	if (IS_ERR(found))
		return PTR_ERR(found);
	*object = found;
	return found->file.object;
}
