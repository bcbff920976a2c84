// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The virtio device (MMIO or PCI): its queues, the messages in them, and the kernel's services for the Rust half. Knows neither
 * the protocol nor any ioctl.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/rcupdate.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "pvgpu.h"

#define PVGPU_DEVICE_ID 63
#define PVGPU_MAGIC 0x50475650u	/* "PVGP" */

/* The virtio configuration space (protocol/src/wire.rs). */
struct pvgpu_config {
	__le32 magic;
	__le16 version;
	__le16 request_queues;
};

/* --- messages --- */

/* How long a wait that no signal ends may last: far longer than a host takes to end a request that was cancelled. */
#define PVGPU_SOON (10 * HZ)
/* Bytes of a short message: among these are all that let something on the host go. */
#define PVGPU_SHORT 256

struct pvgpu_message *pvgpu_message_new(size_t request, size_t response)
{
	size_t offset = ALIGN(request, L1_CACHE_BYTES);
	struct pvgpu_message *message;
	bool inside;
	gfp_t flags;

	if (request > KMALLOC_MAX_SIZE || response > KMALLOC_MAX_SIZE)
		return NULL;
	/* What a process has on the host must not stay there because its memory is at the limit, for which it may be dying. */
	flags = offset + response <= PVGPU_SHORT ? GFP_KERNEL | __GFP_NOFAIL : GFP_KERNEL_ACCOUNT;
	/* A buffer of several pages need not be in one piece of memory, and starts a page. */
	inside = offset + response <= PAGE_SIZE;
	message = kzalloc(struct_size(message, inside, inside ? offset + response : 0), flags);
	if (!message)
		return NULL;
	if (!inside)
		offset = PAGE_ALIGN(request);
	message->bytes = inside ? message->inside : kvzalloc(offset + response, GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!message->bytes) {
		kfree(message);
		return NULL;
	}
	message->request = request;
	message->response = response;
	message->response_offset = offset;
	init_completion(&message->done);
	return message;
}

static void pvgpu_message_free(struct pvgpu_message *message)
{
	if (message->bytes != message->inside)
		kvfree(message->bytes);
	kfree(message);
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

/* The pieces of memory that a part of a message lies in; nearly always one. */
struct pvgpu_pieces {
	struct scatterlist one;
	struct sg_table several;
};

/* Gives the list, or NULL without memory. */
static struct scatterlist *pvgpu_pieces_list(struct pvgpu_pieces *pieces, u8 *bytes, size_t length)
{
	unsigned int count = PFN_UP(length), index;
	struct page **pages;
	int error;

	if (!is_vmalloc_addr(bytes)) {
		pieces->several.sgl = NULL;
		sg_init_one(&pieces->one, bytes, length);
		return &pieces->one;
	}
	pages = kvmalloc_array(count, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return NULL;
	for (index = 0; index < count; index++)
		pages[index] = vmalloc_to_page(bytes + index * PAGE_SIZE);
	error = sg_alloc_table_from_pages(&pieces->several, pages, count, 0, length, GFP_KERNEL);
	kvfree(pages);
	return error ? NULL : pieces->several.sgl;
}

static void pvgpu_pieces_free(struct pvgpu_pieces *pieces)
{
	if (pieces->several.sgl)
		sg_free_table(&pieces->several);
}

/* Queues a message; -ENOSPC when there is no room for it now. */
static int pvgpu_message_queue(struct pvgpu_message *message, struct scatterlist *lists[2])
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;
	int error;

	spin_lock_irqsave(&queue->lock, flags);
	if (queue->gone) {
		error = -ENODEV;
	} else {
		error = virtqueue_add_sgs(queue->ring, lists, 1, 1, message, GFP_ATOMIC);
		if (!error) {
			message->state = PVGPU_IN_FLIGHT;
			queue->in_flight++;
			queue->submitted = true;
		} else if (!queue->in_flight) {
			/* It would never become better. */
			error = -ENOMEM;
		}
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	return error;
}

int pvgpu_message_submit(struct pvgpu_message *message, struct pvgpu_queue *queue, size_t length,
			 enum pvgpu_patience patience)
{
	struct pvgpu_pieces out, in;
	struct scatterlist *lists[2];
	int error = -ENOMEM, waited;

	if (message->state != PVGPU_FILLING || !length || length > message->request)
		return -EINVAL;
	lists[0] = pvgpu_pieces_list(&out, message->bytes, length);
	if (!lists[0])
		return error;
	lists[1] = pvgpu_pieces_list(&in, message->bytes + message->response_offset, message->response);
	if (!lists[1])
		goto free;
	message->queue = queue;
	if (patience == PVGPU_SOON_ONLY)
		waited = wait_event_timeout(queue->room, (error = pvgpu_message_queue(message, lists)) != -ENOSPC,
					    PVGPU_SOON) ? 0 : -EIO;
	else if (patience == PVGPU_KILLABLE)
		waited = wait_event_killable(queue->room, (error = pvgpu_message_queue(message, lists)) != -ENOSPC);
	else
		waited = wait_event_interruptible(queue->room,
						  (error = pvgpu_message_queue(message, lists)) != -ENOSPC);
	if (waited)
		error = waited == -ERESTARTSYS ? -EINTR : waited;
	pvgpu_pieces_free(&in);
free:
	pvgpu_pieces_free(&out);
	return error;
}

/* Takes what the device has returned; with the queue's lock. */
static void pvgpu_queue_take(struct pvgpu_queue *queue)
{
	struct pvgpu_message *message;
	unsigned int written;
	bool room = false;

	while ((message = virtqueue_get_buf(queue->ring, &written))) {
		queue->in_flight--;
		room = true;
		if (message->state == PVGPU_ABANDONED) {
			llist_add(&message->abandoned, &queue->abandoned);
			continue;
		}
		message->written = min_t(size_t, written, message->response);
		message->state = PVGPU_COMPLETE;
		complete_all(&message->done);
	}
	if (room)
		wake_up_all(&queue->room);
}

/* Frees the messages that were abandoned and have come back; in process context, as memory of vmalloc wants it. */
static void pvgpu_queue_free_abandoned(struct pvgpu_queue *queue)
{
	struct pvgpu_message *message, *next;

	llist_for_each_entry_safe(message, next, llist_del_all(&queue->abandoned), abandoned)
		pvgpu_message_free(message);
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

int pvgpu_message_wait(struct pvgpu_message *message, enum pvgpu_patience patience)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;
	int error;

	/* A device that answers while the doorbell rings has done so by now: no interrupt is needed then. */
	spin_lock_irqsave(&queue->lock, flags);
	if (!queue->gone)
		pvgpu_queue_take(queue);
	spin_unlock_irqrestore(&queue->lock, flags);
	pvgpu_queue_free_abandoned(queue);
	if (patience == PVGPU_SOON_ONLY) {
		if (!wait_for_completion_timeout(&message->done, PVGPU_SOON)) {
			pr_err_ratelimited("pvgpu: the host does not end a request that was cancelled; something of its result may be lost until the device is reset\n");
			return -EIO;
		}
	} else {
		if (patience == PVGPU_KILLABLE)
			error = wait_for_completion_killable(&message->done);
		else
			error = wait_for_completion_interruptible(&message->done);
		if (error)
			return -EINTR;
	}
	return message->state == PVGPU_LOST ? -ENODEV : 0;
}

void pvgpu_message_end(struct pvgpu_message *message)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;

	if (message->state != PVGPU_FILLING) {
		bool in_flight;

		/* The lock is also for who has just completed it and still holds it. */
		spin_lock_irqsave(&queue->lock, flags);
		in_flight = message->state == PVGPU_IN_FLIGHT;
		if (in_flight)
			message->state = PVGPU_ABANDONED;
		spin_unlock_irqrestore(&queue->lock, flags);
		if (in_flight)
			return;
	}
	pvgpu_message_free(message);
}

struct pvgpu_queue *pvgpu_queue_here(struct pvgpu *device)
{
	return &device->queues[raw_smp_processor_id() % device->queue_count];
}

void pvgpu_queue_doorbell(struct pvgpu_queue *queue)
{
	bool notify = false;
	unsigned long flags;

	/* pvgpu_stop() waits for the end of this before it takes the ring away. */
	rcu_read_lock();
	spin_lock_irqsave(&queue->lock, flags);
	/* Somebody else may have rung for this submission, too. */
	if (queue->submitted && !queue->gone) {
		queue->submitted = false;
		notify = virtqueue_kick_prepare(queue->ring);
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	if (notify)
		virtqueue_notify(queue->ring);
	rcu_read_unlock();
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

bool pvgpu_gone(const struct pvgpu *device)
{
	return READ_ONCE(device->queues[0].gone);
}

void pvgpu_free(struct pvgpu *device)
{
	unsigned int index;

	for (index = 0; device->queues && index < device->queue_count; index++)
		pvgpu_queue_free_abandoned(&device->queues[index]);
	pvgpu_memory_free(device);
	kfree(device->host);
	kfree(device->queues);
	kfree(device);
}

static int pvgpu_find_queues(struct pvgpu *device)
{
	/* The last one is the event queue. */
	unsigned int count = device->queue_count + 1, index;
	struct virtqueue **rings = kcalloc(count, sizeof(*rings), GFP_KERNEL);
	int error;

	for (index = 0; index < device->queue_count; index++) {
		spin_lock_init(&device->queues[index].lock);
		init_waitqueue_head(&device->queues[index].room);
	}
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info *info = kcalloc(count, sizeof(*info), GFP_KERNEL);

	for (index = 0; info && index < count; index++) {
		info[index].name = index < device->queue_count ? "request" : "event";
		info[index].callback = index < device->queue_count ? pvgpu_queue_used : pvgpu_event_used;
	}
	error = rings && info ? virtio_find_vqs(device->virtio, count, rings, info, NULL) : -ENOMEM;
	kfree(info);
#else
	const char **names = kcalloc(count, sizeof(*names), GFP_KERNEL);
	vq_callback_t **callbacks = kcalloc(count, sizeof(*callbacks), GFP_KERNEL);

	for (index = 0; names && callbacks && index < count; index++) {
		names[index] = index < device->queue_count ? "request" : "event";
		callbacks[index] = index < device->queue_count ? pvgpu_queue_used : pvgpu_event_used;
	}
	error = rings && names && callbacks ?
		virtio_find_vqs(device->virtio, count, rings, callbacks, names, NULL) : -ENOMEM;
	kfree(names);
	kfree(callbacks);
#endif
	for (index = 0; !error && index < device->queue_count; index++)
		device->queues[index].ring = rings[index];
	if (!error)
		device->event_ring = rings[device->queue_count];
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
		WRITE_ONCE(device->queues[index].gone, true);
		spin_unlock_irq(&device->queues[index].lock);
	}
	synchronize_rcu();
	virtio_reset_device(device->virtio);
	for (index = 0; index < device->queue_count; index++) {
		struct pvgpu_queue *queue = &device->queues[index];

		spin_lock_irq(&queue->lock);
		pvgpu_queue_take(queue);
		while ((message = virtqueue_detach_unused_buf(queue->ring))) {
			if (message->state == PVGPU_ABANDONED) {
				llist_add(&message->abandoned, &queue->abandoned);
				continue;
			}
			message->state = PVGPU_LOST;
			complete_all(&message->done);
		}
		wake_up_all(&queue->room);
		spin_unlock_irq(&queue->lock);
	}
	pvgpu_event_stop(device);
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
	pvgpu_event_init(device);
	pvgpu_memory_init(device);
	/* All of them, since the event queue's number is the one after the last. */
	device->queue_count = le16_to_cpu(config.request_queues);
	device->queues = kcalloc(device->queue_count, sizeof(*device->queues), GFP_KERNEL);
	error = device->queues ? pvgpu_find_queues(device) : -ENOMEM;
	if (error)
		goto free;
	pvgpu_memory_find(device);
	virtio_device_ready(virtio);
	error = pvgpu_event_start(device);
	if (error)
		goto stop;
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
	if (device->node) {
		/* Whoever was quick enough to open it keeps the device until he closes it. */
		drm_dev_put(device->node);
		return error;
	}
free:
	pvgpu_free(device);
	return error;
}

static void pvgpu_remove(struct virtio_device *virtio)
{
	struct pvgpu *device = virtio->priv;

	pvgpu_stop(device);
	pvgpu_fence_forget_signaled(device);
	pvgpu_node_remove(device);
}

#ifdef CONFIG_PM
/* The host would lose all that processes have there. */
static int pvgpu_freeze(struct virtio_device *virtio)
{
	dev_err(&virtio->dev, "a GPU of the host cannot be suspended: suspend the VM, or remove the module pvgpu before\n");
	return -EBUSY;
}
#endif

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
#ifdef CONFIG_PM
	.freeze = pvgpu_freeze,
#endif
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
	int error = pvgpu_fence_init();

	if (error)
		return error;
	error = register_virtio_driver(&pvgpu_driver);
	if (error)
		goto exit;
	if (mmio)
		error = pvgpu_announce_mmio();
	if (!error)
		return 0;
	unregister_virtio_driver(&pvgpu_driver);
exit:
	pvgpu_fence_exit();
	return error;
}

static void __exit pvgpu_exit(void)
{
	if (mmio)
		platform_device_unregister(mmio_device);
	unregister_virtio_driver(&pvgpu_driver);
	pvgpu_fence_exit();
}

module_init(pvgpu_init);
module_exit(pvgpu_exit);

MODULE_LICENSE("Dual BSD/GPL");
MODULE_AUTHOR("The pvgpu developers");
MODULE_DESCRIPTION("Guest driver of pvgpu, a paravirtual GPU");
MODULE_VERSION(PVGPU_VERSION);
MODULE_SOFTDEP("pre: virtio_mmio");	/* for mmio= */
