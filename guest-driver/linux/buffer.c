// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Buffers as dma-bufs. Their memory is the host's: it can be mapped, but has no pages of this kernel, so no other driver of the
 * guest can import it. Fences are the host's as well: those of the guest's dma-buf say nothing.
 */
#include <linux/dma-buf.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <drm/drm_device.h>

#include "pvgpu.h"

static int pvgpu_buffer_attach(struct dma_buf *buffer, struct dma_buf_attachment *attachment)
{
	return -EOPNOTSUPP;
}

/* The core wants these two; nobody attaches, so nobody calls them. */
static struct sg_table *pvgpu_buffer_map(struct dma_buf_attachment *attachment, enum dma_data_direction direction)
{
	return ERR_PTR(-EOPNOTSUPP);
}

static void pvgpu_buffer_unmap(struct dma_buf_attachment *attachment, struct sg_table *table,
			       enum dma_data_direction direction)
{
}

/* Who writes waits for all of the host's fences, who reads for those of writers. Caches are coherent. */
static int pvgpu_buffer_begin_cpu_access(struct dma_buf *buffer, enum dma_data_direction direction)
{
	struct pvgpu_object *object = buffer->priv;
	struct pvgpu_session *session = object->file.session;
	bool write = direction == DMA_BIDIRECTIONAL || direction == DMA_TO_DEVICE;
	int result = pvgpu_rust_wait(session, session->host, object->file.object, write ? POLLOUT : POLLIN);

	if (result == -EINTR && signal_pending(current))
		return -ERESTARTSYS;
	return min(result, 0);
}

static int pvgpu_buffer_mmap(struct dma_buf *buffer, struct vm_area_struct *vma)
{
	struct pvgpu_object *object = buffer->priv;

	return pvgpu_map(&object->file, vma);
}

static void pvgpu_buffer_release(struct dma_buf *buffer)
{
	pvgpu_object_put(buffer->priv);
}

static const struct dma_buf_ops pvgpu_buffer_operations = {
	.attach = pvgpu_buffer_attach,
	.map_dma_buf = pvgpu_buffer_map,
	.unmap_dma_buf = pvgpu_buffer_unmap,
	.begin_cpu_access = pvgpu_buffer_begin_cpu_access,
	.mmap = pvgpu_buffer_mmap,
	.release = pvgpu_buffer_release,
};

struct file *pvgpu_buffer_file(struct pvgpu_object *object, int access)
{
	struct pvgpu_session *session = object->file.session;
	struct dma_buf_export_info info = {
		.exp_name = session->device->identity.name,
		.owner = THIS_MODULE,
		.ops = &pvgpu_buffer_operations,
		.flags = access,
		.priv = object,
	};
	struct dma_buf *buffer;
	u64 size;
	int error;

	error = pvgpu_rust_size(session, session->host, object->file.object, &size);
	if (error)
		return ERR_PTR(error);
	info.size = size;
	buffer = dma_buf_export(&info);
	if (IS_ERR(buffer))
		return ERR_CAST(buffer);
	/* As DRM's own dma-bufs: mappings are among those that the device takes from all processes when it goes away. */
	buffer->file->f_mapping = session->device->node->anon_inode->i_mapping;
	pvgpu_object_get(object);
	return buffer->file;
}

struct pvgpu_object *pvgpu_buffer_object(struct pvgpu_session *session, int fd)
{
	struct dma_buf *buffer = dma_buf_get(fd);
	struct pvgpu_object *object = ERR_PTR(-EINVAL), *found;

	if (IS_ERR(buffer))
		return ERR_CAST(buffer);
	if (buffer->ops == &pvgpu_buffer_operations) {
		found = buffer->priv;
		if (found->file.session == session)
			object = pvgpu_object_get(found);
	}
	dma_buf_put(buffer);
	return object;
}

MODULE_IMPORT_NS(DMA_BUF);
