// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The virtio device (MMIO or PCI): its queues, the messages in them, and the kernel's services for the Rust half. Knows neither
 * the protocol nor any ioctl.
 */
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#include "pvgpu.h"

#define PVGPU_DEVICE_ID 63
#define PVGPU_APERTURE_REGION 0
#define PVGPU_MAGIC 0x50475650u	/* "PVGP" */

/* The virtio configuration space (protocol/src/wire.rs). */
struct pvgpu_config {
	__le32 magic;
	__le16 version;
	__le16 request_queues;
};

/* --- messages --- */

struct pvgpu_message *pvgpu_message_new(struct pvgpu *device, size_t request, size_t response)
{
	size_t offset = ALIGN(request, L1_CACHE_BYTES);
	struct pvgpu_message *message;

	if (request > KMALLOC_MAX_SIZE || response > KMALLOC_MAX_SIZE)
		return NULL;
	message = kzalloc(struct_size(message, bytes, offset + response), GFP_KERNEL | __GFP_NOWARN);
	if (!message)
		return NULL;
	message->device = device;
	message->request = request;
	message->response = response;
	message->response_offset = offset;
	init_completion(&message->done);
	return message;
}

void *pvgpu_message_request(struct pvgpu_message *message)
{
	return message->bytes;
}

const void *pvgpu_message_response(const struct pvgpu_message *message)
{
	return message->bytes + message->response_offset;
}

size_t pvgpu_message_room(const struct pvgpu_message *message)
{
	return message->state == PVGPU_FILLING ? message->request : 0;
}

size_t pvgpu_message_written(const struct pvgpu_message *message)
{
	return message->state == PVGPU_COMPLETE ? message->written : 0;
}

int pvgpu_message_submit(struct pvgpu_message *message, size_t length)
{
	struct pvgpu *device = message->device;
	struct pvgpu_queue *queue = &device->queues[raw_smp_processor_id() % device->queue_count];
	struct scatterlist out, in, *lists[] = { &out, &in };
	unsigned long flags;
	int error;

	if (message->state != PVGPU_FILLING || !length || length > message->request)
		return -EINVAL;
	sg_init_one(&out, message->bytes, length);
	sg_init_one(&in, message->bytes + message->response_offset, message->response);
	message->queue = queue;
	spin_lock_irqsave(&queue->lock, flags);
	if (device->gone) {
		error = -ENODEV;
	} else {
		error = virtqueue_add_sgs(queue->ring, lists, 1, 1, message, GFP_ATOMIC);
		if (!error) {
			message->state = PVGPU_IN_FLIGHT;
			queue->submitted = true;
		} else if (error == -ENOSPC) {
			error = -EAGAIN;
		}
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	return error;
}

/* Takes what the device has returned; with the queue's lock. */
static void pvgpu_queue_take(struct pvgpu_queue *queue)
{
	struct pvgpu_message *message;
	unsigned int written;

	while ((message = virtqueue_get_buf(queue->ring, &written))) {
		if (message->state == PVGPU_ABANDONED) {
			kfree(message);
			continue;
		}
		message->written = min_t(size_t, written, message->response);
		message->state = PVGPU_COMPLETE;
		complete_all(&message->done);
	}
}

/* The device's interrupt. */
static void pvgpu_queue_used(struct virtqueue *ring)
{
	struct pvgpu *device = ring->vdev->priv;
	struct pvgpu_queue *queue = &device->queues[ring->index];
	unsigned long flags;

	spin_lock_irqsave(&queue->lock, flags);
	do {
		virtqueue_disable_cb(ring);
		pvgpu_queue_take(queue);
	} while (!virtqueue_enable_cb(ring));
	spin_unlock_irqrestore(&queue->lock, flags);
}

bool pvgpu_message_complete(struct pvgpu_message *message)
{
	return completion_done(&message->done);
}

int pvgpu_message_wait(struct pvgpu_message *message, bool only_fatal)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;
	int error;

	/* A device that answers while the doorbell rings has done so by now: no interrupt is needed then. */
	spin_lock_irqsave(&queue->lock, flags);
	if (!message->device->gone)
		pvgpu_queue_take(queue);
	spin_unlock_irqrestore(&queue->lock, flags);
	if (only_fatal)
		error = wait_for_completion_killable(&message->done);
	else
		error = wait_for_completion_interruptible(&message->done);
	if (error)
		return -EINTR;
	return message->state == PVGPU_LOST ? -ENODEV : 0;
}

void pvgpu_message_end(struct pvgpu_message *message)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;

	if (message->state != PVGPU_FILLING) {
		bool in_flight;

		spin_lock_irqsave(&queue->lock, flags);
		in_flight = message->state == PVGPU_IN_FLIGHT;
		if (in_flight)
			message->state = PVGPU_ABANDONED;
		spin_unlock_irqrestore(&queue->lock, flags);
		if (in_flight)
			return;
	}
	kfree(message);
}

void pvgpu_doorbell(struct pvgpu *device)
{
	unsigned int index;

	/* Of another queue's submission somebody else rings the doorbell, too: one of both finds it done. */
	for (index = 0; index < device->queue_count; index++) {
		struct pvgpu_queue *queue = &device->queues[index];
		bool notify = false;
		unsigned long flags;

		if (!READ_ONCE(queue->submitted))
			continue;
		spin_lock_irqsave(&queue->lock, flags);
		if (queue->submitted && !device->gone) {
			queue->submitted = false;
			notify = virtqueue_kick_prepare(queue->ring);
		}
		spin_unlock_irqrestore(&queue->lock, flags);
		if (notify)
			virtqueue_notify(queue->ring);
	}
}

/* --- other services --- */

u64 pvgpu_take_ids(struct pvgpu *device, u32 count)
{
	return atomic64_fetch_add(count, &device->last_id);
}

u64 pvgpu_now_ns(void)
{
	return ktime_get_ns();
}

void *pvgpu_allocate(size_t length)
{
	return kzalloc(ALIGN(length, 16), GFP_KERNEL);
}

int pvgpu_copy_from_user(void *target, u64 source, size_t length)
{
	return copy_from_user(target, u64_to_user_ptr(source), length) ? -EFAULT : 0;
}

int pvgpu_copy_to_user(u64 target, const void *source, size_t length)
{
	return copy_to_user(u64_to_user_ptr(target), source, length) ? -EFAULT : 0;
}

void pvgpu_print(const char *text, size_t length)
{
	pr_err("pvgpu: %.*s\n", (int)length, text);
}

void pvgpu_bug(void)
{
	BUG();
}

/* --- the device's life --- */

void pvgpu_free(struct pvgpu *device)
{
	kfree(device->host);
	kfree(device->queues);
	kfree(device);
}

static int pvgpu_find_queues(struct pvgpu *device)
{
	unsigned int count = device->queue_count, index;
	struct virtqueue **rings = kcalloc(count, sizeof(*rings), GFP_KERNEL);
	int error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info *info = kcalloc(count, sizeof(*info), GFP_KERNEL);

	for (index = 0; info && index < count; index++) {
		info[index].name = "request";
		info[index].callback = pvgpu_queue_used;
	}
	error = rings && info ? virtio_find_vqs(device->virtio, count, rings, info, NULL) : -ENOMEM;
	kfree(info);
#else
	const char **names = kcalloc(count, sizeof(*names), GFP_KERNEL);
	vq_callback_t **callbacks = kcalloc(count, sizeof(*callbacks), GFP_KERNEL);

	for (index = 0; names && callbacks && index < count; index++) {
		names[index] = "request";
		callbacks[index] = pvgpu_queue_used;
	}
	error = rings && names && callbacks ?
		virtio_find_vqs(device->virtio, count, rings, callbacks, names, NULL) : -ENOMEM;
	kfree(names);
	kfree(callbacks);
#endif
	for (index = 0; !error && index < count; index++) {
		spin_lock_init(&device->queues[index].lock);
		device->queues[index].ring = rings[index];
	}
	kfree(rings);
	return error;
}

/* Takes the queues from the device. Who waits for a response hears that there will be none. */
static void pvgpu_stop(struct pvgpu *device)
{
	struct pvgpu_message *message;
	unsigned int index;

	for (index = 0; index < device->queue_count; index++) {
		spin_lock_irq(&device->queues[index].lock);
		WRITE_ONCE(device->gone, true);
		spin_unlock_irq(&device->queues[index].lock);
	}
	virtio_reset_device(device->virtio);
	for (index = 0; index < device->queue_count; index++) {
		struct pvgpu_queue *queue = &device->queues[index];

		spin_lock_irq(&queue->lock);
		while ((message = virtqueue_detach_unused_buf(queue->ring))) {
			if (message->state == PVGPU_ABANDONED) {
				kfree(message);
				continue;
			}
			message->state = PVGPU_LOST;
			complete_all(&message->done);
		}
		spin_unlock_irq(&queue->lock);
	}
	device->virtio->config->del_vqs(device->virtio);
}

static int pvgpu_probe(struct virtio_device *virtio)
{
	struct pvgpu_config config;
	struct pvgpu *device;
	int error;

	virtio_cread_bytes(virtio, 0, &config, sizeof(config));
	if (le32_to_cpu(config.magic) != PVGPU_MAGIC || !le16_to_cpu(config.request_queues)) {
		dev_err(&virtio->dev, "no pvgpu device (magic %#x): give the VM a pvgpu GPU\n",
			le32_to_cpu(config.magic));
		return -ENODEV;
	}
	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device)
		return -ENOMEM;
	device->virtio = virtio;
	virtio->priv = device;
	device->queue_count = min_t(unsigned int, le16_to_cpu(config.request_queues), num_possible_cpus());
	device->queues = kcalloc(device->queue_count, sizeof(*device->queues), GFP_KERNEL);
	error = device->queues ? pvgpu_find_queues(device) : -ENOMEM;
	if (error)
		goto free;
	if (!virtio_get_shm_region(virtio, &device->aperture, PVGPU_APERTURE_REGION))
		device->aperture.len = 0;
	virtio_device_ready(virtio);
	device->host = pvgpu_rust_connect(device, &device->identity, &error);
	if (!device->host) {
		dev_err(&virtio->dev, "the GPU does not answer as it should (%d): update the VMM or this module\n", error);
		goto stop;
	}
	/* What is outside of the region is no memory of ours, whatever the host says. */
	device->aperture.len = min_t(u64, device->aperture.len, device->identity.aperture);
	error = pvgpu_node_register(device);
	if (error)
		goto stop;
	return 0;
stop:
	pvgpu_stop(device);
free:
	pvgpu_free(device);
	return error;
}

static void pvgpu_remove(struct virtio_device *virtio)
{
	struct pvgpu *device = virtio->priv;

	pvgpu_stop(device);
	pvgpu_node_remove(device);
}

static const struct virtio_device_id pvgpu_ids[] = {
	{ PVGPU_DEVICE_ID, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, pvgpu_ids);

static struct virtio_driver pvgpu_driver = {
	.driver.name = "pvgpu",
	.driver.owner = THIS_MODULE,
	.id_table = pvgpu_ids,
	.probe = pvgpu_probe,
	.remove = pvgpu_remove,
};

/*
 * A virtio-mmio device that the kernel cannot find by itself: Debian's kernels read no virtio_mmio.device= of the command line,
 * and a small VMM has no ACPI tables or device tree to announce it in.
 */
static char *mmio;
module_param(mmio, charp, 0444);
MODULE_PARM_DESC(mmio, "a virtio-mmio device that nothing else announces: SIZE@ADDRESS:IRQ, such as 4K@0xd0000000:5");
static struct platform_device *mmio_device;

static int __init pvgpu_announce_mmio(void)
{
	struct resource resources[2] = {};
	unsigned long long size, base;
	unsigned int irq;
	char *rest;
	int end = 0;

	size = memparse(mmio, &rest);
	if (sscanf(rest, "@%lli:%u%n", &base, &irq, &end) != 2 || !end || rest[end] || !size) {
		pr_err("pvgpu: mmio=%s is not SIZE@ADDRESS:IRQ, such as 4K@0xd0000000:5\n", mmio);
		return -EINVAL;
	}
	resources[0] = (struct resource)DEFINE_RES_MEM(base, size);
	resources[1] = (struct resource)DEFINE_RES_IRQ(irq);
	mmio_device = platform_device_register_simple("virtio-mmio", PLATFORM_DEVID_AUTO, resources, ARRAY_SIZE(resources));
	return PTR_ERR_OR_ZERO(mmio_device);
}

static int __init pvgpu_init(void)
{
	int error = register_virtio_driver(&pvgpu_driver);

	if (!error && mmio) {
		error = pvgpu_announce_mmio();
		if (error)
			unregister_virtio_driver(&pvgpu_driver);
	}
	return error;
}

static void __exit pvgpu_exit(void)
{
	if (mmio)
		platform_device_unregister(mmio_device);
	unregister_virtio_driver(&pvgpu_driver);
}

module_init(pvgpu_init);
module_exit(pvgpu_exit);

MODULE_LICENSE("Dual BSD/GPL");
MODULE_DESCRIPTION("Guest driver of pvgpu, a paravirtual GPU");
