// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The virtio device (MMIO or PCI): its sessions, its queues, the messages in them, and the kernel's services for the Rust half.
 * Knows no ioctl, and of the protocol only how the host says that it does not know the session.
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

#ifndef PVGPU_DEVICE_ID
#define PVGPU_DEVICE_ID 63
#endif
#define PVGPU_MAGIC 0x50475650u	/* "PVGP" */

/* The virtio configuration space (protocol/src/wire.rs). */
struct pvgpu_config {
	__le32 magic;
	__le16 version;
	__le16 request_queues;
};

/* The header of a response (protocol/src/wire.rs). */
struct pvgpu_response {
	__le64 id;
	__le32 result;
	__le32 length;
};

struct workqueue_struct *pvgpu_workqueue;

/* --- messages --- */

/* How long a wait that no signal ends may last: far longer than a host takes to end a request that was cancelled. */
#define PVGPU_SOON (10 * HZ)
/* Bytes of a short message: among these are all that let something on the host go. */
#define PVGPU_SHORT 256
/* How often the host is asked whether it still knows a session in which something waits; less often while it does not answer. */
#define PVGPU_PATIENCE HZ
#define PVGPU_PATIENCE_MAX (64 * HZ)
/* One of so many descriptors of a ring is left for that question. */
#define PVGPU_SPARE 16
/* How often a hello that waits looks at the device's status. */
#define PVGPU_HELLO_LOOK (HZ / 4)

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
static int pvgpu_message_queue(struct pvgpu_message *message, struct scatterlist *lists[2], enum pvgpu_patience patience)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;
	int error;

	spin_lock_irqsave(&queue->lock, flags);
	if (queue->session != message->session) {
		error = -ENODEV;
	} else if (patience != PVGPU_AT_ONCE && queue->in_flight &&
		   queue->ring->num_free <= virtqueue_get_vring_size(queue->ring) / PVGPU_SPARE) {
		error = -ENOSPC;
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

int pvgpu_message_submit(struct pvgpu_message *message, struct pvgpu_session *session, struct pvgpu_queue *queue,
			 size_t length, enum pvgpu_patience patience)
{
	struct pvgpu_pieces out, in;
	struct scatterlist *lists[2];
	int error = -ENOMEM, waited = 0;

	if (message->state != PVGPU_FILLING || !length || length > message->request)
		return -EINVAL;
	lists[0] = pvgpu_pieces_list(&out, message->bytes, length);
	if (!lists[0])
		return error;
	lists[1] = pvgpu_pieces_list(&in, message->bytes + message->response_offset, message->response);
	if (!lists[1])
		goto free;
	message->session = session;
	message->queue = queue;
#define QUEUED ((error = pvgpu_message_queue(message, lists, patience)) != -ENOSPC)
	switch (patience) {
	case PVGPU_AT_ONCE:
		(void)QUEUED;
		break;
	case PVGPU_SOON_ONLY:
		waited = wait_event_timeout(queue->room, QUEUED, PVGPU_SOON) ? 0 : -EIO;
		break;
	case PVGPU_KILLABLE:
	case PVGPU_HELLO:
		waited = wait_event_killable(queue->room, QUEUED);
		break;
	case PVGPU_INTERRUPTIBLE:
		waited = wait_event_interruptible(queue->room, QUEUED);
	}
#undef QUEUED
	if (waited)
		error = waited == -ERESTARTSYS ? -EINTR : waited;
	pvgpu_pieces_free(&in);
free:
	pvgpu_pieces_free(&out);
	return error;
}

/* Whether a response says that the host knows no session. */
static bool pvgpu_message_says_lost(const struct pvgpu_message *message)
{
	const struct pvgpu_response *response = pvgpu_message_response(message);

	return message->written >= sizeof(*response) && response->result == cpu_to_le32(-ENOTCONN);
}

/* Has the session attended to, unless it has ended; with the queue's lock. */
static void pvgpu_queue_attend(struct pvgpu_queue *queue, unsigned long delay)
{
	if (!queue->session)
		return;
	if (delay)
		queue_delayed_work(pvgpu_workqueue, &queue->session->device->attend, delay);
	else
		mod_delayed_work(pvgpu_workqueue, &queue->session->device->attend, 0);
}

/* Takes what the device has returned; with the queue's lock. */
static void pvgpu_queue_take(struct pvgpu_queue *queue)
{
	struct pvgpu_message *message;
	unsigned int written;
	bool room = false;

	while ((message = virtqueue_get_buf(queue->ring, &written))) {
		bool lost;

		queue->in_flight--;
		queue->returned++;
		room = true;
		message->written = min_t(size_t, written, message->response);
		lost = pvgpu_message_says_lost(message);
		if (lost) {
			WRITE_ONCE(message->session->lost, true);
			pvgpu_queue_attend(queue, 0);
		}
		if (message->state == PVGPU_ABANDONED) {
			llist_add(&message->abandoned, &queue->abandoned);
			continue;
		}
		message->state = lost ? PVGPU_LOST : PVGPU_COMPLETE;
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

static bool pvgpu_needs_reset(const struct pvgpu *device)
{
	return device->virtio->config->get_status(device->virtio) & VIRTIO_CONFIG_S_NEEDS_RESET;
}

static int pvgpu_hello_wait(struct pvgpu_message *message)
{
	unsigned long end = jiffies + PVGPU_SOON;
	long waited;

	do {
		if (pvgpu_needs_reset(message->session->device))
			return -ENODEV;
		waited = wait_for_completion_killable_timeout(&message->done, PVGPU_HELLO_LOOK);
		if (waited)
			return waited < 0 ? -EINTR : 0;
	} while (time_before(jiffies, end));
	return -EIO;
}

int pvgpu_message_wait(struct pvgpu_message *message, enum pvgpu_patience patience)
{
	struct pvgpu_queue *queue = message->queue;
	unsigned long flags;
	int error;

	/* A device that answers while the doorbell rings has done so by now: no interrupt is needed then. */
	spin_lock_irqsave(&queue->lock, flags);
	if (queue->session)
		pvgpu_queue_take(queue);
	spin_unlock_irqrestore(&queue->lock, flags);
	pvgpu_queue_free_abandoned(queue);
	if (!completion_done(&message->done))
		pvgpu_session_waits(message->session);
	if (patience == PVGPU_HELLO) {
		error = pvgpu_hello_wait(message);
		if (error)
			return error;
	} else if (patience == PVGPU_SOON_ONLY) {
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

struct pvgpu_queue *pvgpu_queue_here(struct pvgpu_session *session)
{
	struct pvgpu *device = session->device;

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
	if (queue->submitted && queue->session) {
		queue->submitted = false;
		notify = virtqueue_kick_prepare(queue->ring);
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	if (notify)
		virtqueue_notify(queue->ring);
	rcu_read_unlock();
}

/* --- other services --- */

u64 pvgpu_take_ids(struct pvgpu_session *session, u32 count)
{
	/* Those of one session are never those of another, so an event that was under way is not mistaken for a later one. */
	return atomic64_fetch_add(count, &session->device->last_id);
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

/* --- queues --- */

void pvgpu_free(struct pvgpu *device)
{
	unsigned int index;

	for (index = 0; device->queues && index < device->queue_count; index++)
		pvgpu_queue_free_abandoned(&device->queues[index]);
	pvgpu_memory_free(device);
	kfree(device->queues);
	kfree(device);
}

/* How many the device has, before the event queue; none if it is not ours. */
static unsigned int pvgpu_request_queues(struct virtio_device *virtio)
{
	struct pvgpu_config config;

	virtio_cread_bytes(virtio, 0, &config, sizeof(config));
	return config.magic == cpu_to_le32(PVGPU_MAGIC) ? le16_to_cpu(config.request_queues) : 0;
}

static int pvgpu_find_queues(struct pvgpu *device)
{
	/* The last one is the event queue. */
	unsigned int count = device->queue_count + 1, index;
	struct virtqueue **rings = kcalloc(count, sizeof(*rings), GFP_KERNEL);
	int error;

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
		WRITE_ONCE(device->queues[index].session, NULL);
		spin_unlock_irq(&device->queues[index].lock);
	}
	synchronize_rcu();
	virtio_reset_device(device->virtio);
	/* Before anybody hears of it: whoever has, finds no memory of the session any more. */
	if (device->node)
		pvgpu_memory_forget(device);
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
		queue->in_flight = 0;
		queue->submitted = false;
		wake_up_all(&queue->room);
		spin_unlock_irq(&queue->lock);
		pvgpu_queue_free_abandoned(queue);
	}
	pvgpu_event_stop(device);
	device->virtio->config->del_vqs(device->virtio);
}

/* --- sessions --- */

struct pvgpu_session *pvgpu_session_get(struct pvgpu_session *session)
{
	kref_get(&session->references);
	return session;
}

static void pvgpu_session_release(struct kref *references)
{
	struct pvgpu_session *session = container_of(references, struct pvgpu_session, references);

	kfree(session->host);
	kfree(session);
}

void pvgpu_session_put(struct pvgpu_session *session)
{
	kref_put(&session->references, pvgpu_session_release);
}

bool pvgpu_session_over(const struct pvgpu_session *session)
{
	return READ_ONCE(session->device->queues[0].session) != session;
}

void pvgpu_session_waits(struct pvgpu_session *session)
{
	struct pvgpu *device = session->device;
	unsigned long flags;

	if (delayed_work_pending(&device->attend))
		return;
	spin_lock_irqsave(&device->queues[0].lock, flags);
	pvgpu_queue_attend(&device->queues[0], PVGPU_PATIENCE);
	spin_unlock_irqrestore(&device->queues[0].lock, flags);
}

/* Sets the queues of a device up that has accepted its features, and says hello; with the mutex. */
static int pvgpu_session_start(struct pvgpu *device, struct pvgpu_identity *identity)
{
	struct pvgpu_session *session = kzalloc(sizeof(*session), GFP_KERNEL);
	unsigned int index;
	int error;

	if (!session)
		return -ENOMEM;
	kref_init(&session->references);
	session->device = device;
	error = pvgpu_find_queues(device);
	if (error)
		goto put;
	for (index = 0; index < device->queue_count; index++) {
		spin_lock_irq(&device->queues[index].lock);
		WRITE_ONCE(device->queues[index].session, session);
		spin_unlock_irq(&device->queues[index].lock);
	}
	virtio_device_ready(device->virtio);
	error = pvgpu_event_start(device);
	if (!error)
		session->host = pvgpu_rust_connect(session, identity, &error);
	if (session->host) {
		session->pages = identity->pages;
		device->session = session;
		return 0;
	}
	pvgpu_stop(device);
put:
	pvgpu_session_put(session);
	return error;
}

/* With the mutex. */
static void pvgpu_session_end(struct pvgpu *device)
{
	struct pvgpu_session *session = device->session;

	device->session = NULL;
	pvgpu_stop(device);
	pvgpu_memory_free(device);
	pvgpu_session_put(session);
}

/* After the last session has ended and the device was reset: another one, on a host that may be another; with the mutex. */
static int pvgpu_session_restart(struct pvgpu *device)
{
	struct virtio_device *virtio = device->virtio;
	struct pvgpu_identity identity;
	int error;

	virtio_add_status(virtio, VIRTIO_CONFIG_S_ACKNOWLEDGE);
	virtio_add_status(virtio, VIRTIO_CONFIG_S_DRIVER);
	error = virtio->config->finalize_features(virtio);
	if (!error) {
		virtio_add_status(virtio, VIRTIO_CONFIG_S_FEATURES_OK);
		if (!(virtio->config->get_status(virtio) & VIRTIO_CONFIG_S_FEATURES_OK) ||
		    pvgpu_request_queues(virtio) != device->queue_count)
			error = -EPROTO;
	}
	if (error) {
		virtio_reset_device(virtio);
		return error;
	}
	error = pvgpu_session_start(device, &identity);
	if (error || !strcmp(identity.name, device->identity.name))
		return error;
	dev_err(&virtio->dev, "the host's GPU was %s and is %s now: no more of it until the module pvgpu is removed and loaded again\n",
		device->identity.name, identity.name);
	device->dead = true;
	pvgpu_session_end(device);
	return -ENODEV;
}

/* With the mutex. */
static void pvgpu_session_lose(struct pvgpu *device)
{
	dev_warn_ratelimited(&device->virtio->dev,
			     "the host has lost what was open on its GPU: programs get ENODEV until they open it again\n");
	pvgpu_session_end(device);
}

struct pvgpu_session *pvgpu_session_now(struct pvgpu *device)
{
	unsigned int attempts = READ_ONCE(device->attempts);
	struct pvgpu_session *session;
	int error = 0;

	if (mutex_lock_killable(&device->starting))
		return ERR_PTR(-EINTR);
	if (device->session && READ_ONCE(device->session->lost))
		pvgpu_session_lose(device);
	if (!device->session) {
		/* What somebody has just tried in vain is not tried again at once by all who wait here. */
		if (device->dead || device->attempts != attempts) {
			error = -ENODEV;
		} else {
			error = pvgpu_session_restart(device);
			WRITE_ONCE(device->attempts, attempts + 1);
		}
	}
	if (error && error != -EINTR && error != -ENOMEM) {
		if (error != -ENODEV)
			dev_warn_ratelimited(&device->virtio->dev, "the host's GPU cannot be opened again (%d)\n", error);
		error = -ENODEV;
	}
	session = error ? ERR_PTR(error) : pvgpu_session_get(device->session);
	mutex_unlock(&device->starting);
	return session;
}

/* Asks the host whether it knows the session if something waits for it, and comes back; with the mutex. */
static void pvgpu_session_look(struct pvgpu_session *session)
{
	struct pvgpu *device = session->device;
	unsigned long returned = 0;
	unsigned int index;
	bool waiting;

	spin_lock_irq(&device->watch_lock);
	waiting = !hash_empty(device->watches);
	spin_unlock_irq(&device->watch_lock);
	for (index = 0; index < device->queue_count; index++) {
		struct pvgpu_queue *queue = &device->queues[index];

		spin_lock_irq(&queue->lock);
		waiting |= queue->in_flight;
		returned += queue->returned;
		spin_unlock_irq(&queue->lock);
		pvgpu_queue_free_abandoned(queue);
	}
	if (!waiting)
		return;
	/* A host that does not answer, maybe since it is not there, must not have the ring full of questions. */
	device->patience = returned == device->returned ? min_t(unsigned long, 2 * device->patience, PVGPU_PATIENCE_MAX) :
							  PVGPU_PATIENCE;
	device->returned = returned;
	pvgpu_rust_ask(session, session->host);
	spin_lock_irq(&device->queues[0].lock);
	pvgpu_queue_attend(&device->queues[0], device->patience);
	spin_unlock_irq(&device->queues[0].lock);
}

/* When something waits, or the device has changed. */
static void pvgpu_attend(struct work_struct *work)
{
	struct pvgpu *device = container_of(to_delayed_work(work), struct pvgpu, attend);

	mutex_lock(&device->starting);
	if (device->session && (READ_ONCE(device->session->lost) || pvgpu_needs_reset(device)))
		pvgpu_session_lose(device);
	else if (device->session)
		pvgpu_session_look(device->session);
	mutex_unlock(&device->starting);
}

/* There will be no other session. Nobody else attends to the device after this. */
static void pvgpu_end(struct pvgpu *device)
{
	mutex_lock(&device->starting);
	device->dead = true;
	if (device->session)
		pvgpu_session_end(device);
	mutex_unlock(&device->starting);
	cancel_delayed_work_sync(&device->attend);
}

/* --- the device's life --- */

/* Maybe in an interrupt. */
static void pvgpu_config_changed(struct virtio_device *virtio)
{
	struct pvgpu *device = virtio->priv;
	unsigned long flags;

	spin_lock_irqsave(&device->queues[0].lock, flags);
	pvgpu_queue_attend(&device->queues[0], 0);
	spin_unlock_irqrestore(&device->queues[0].lock, flags);
}

static int pvgpu_probe(struct virtio_device *virtio)
{
	unsigned int count = pvgpu_request_queues(virtio), index;
	struct pvgpu *device;
	int error;

	if (!count) {
		dev_err(&virtio->dev, "no pvgpu device: give the VM a pvgpu GPU\n");
		return -ENODEV;
	}
	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device)
		return -ENOMEM;
	device->virtio = virtio;
	virtio->priv = device;
	mutex_init(&device->starting);
	INIT_DELAYED_WORK(&device->attend, pvgpu_attend);
	pvgpu_event_init(device);
	pvgpu_memory_init(device);
	error = -ENOMEM;
	/* All of them, since the event queue's number is the one after the last. */
	device->queues = kcalloc(count, sizeof(*device->queues), GFP_KERNEL);
	if (!device->queues)
		goto free;
	device->queue_count = count;
	for (index = 0; index < count; index++) {
		spin_lock_init(&device->queues[index].lock);
		init_waitqueue_head(&device->queues[index].room);
	}
	pvgpu_memory_find(device);
	mutex_lock(&device->starting);
	error = pvgpu_session_start(device, &device->identity);
	mutex_unlock(&device->starting);
	if (error) {
		dev_err(&virtio->dev, "the GPU does not answer as it should (%d): update the VMM or this module\n", error);
		goto end;
	}
	error = pvgpu_node_register(device);
	if (!error)
		return 0;
end:
	pvgpu_end(device);
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

	pvgpu_end(device);
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
	.config_changed = pvgpu_config_changed,
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
	int error;

	pvgpu_workqueue = alloc_workqueue("pvgpu", WQ_UNBOUND, 0);
	if (!pvgpu_workqueue)
		return -ENOMEM;
	error = register_virtio_driver(&pvgpu_driver);
	if (error)
		goto exit;
	if (mmio)
		error = pvgpu_announce_mmio();
	if (!error)
		return 0;
	unregister_virtio_driver(&pvgpu_driver);
exit:
	destroy_workqueue(pvgpu_workqueue);
	return error;
}

static void __exit pvgpu_exit(void)
{
	if (mmio)
		platform_device_unregister(mmio_device);
	unregister_virtio_driver(&pvgpu_driver);
	destroy_workqueue(pvgpu_workqueue);
}

module_init(pvgpu_init);
module_exit(pvgpu_exit);

MODULE_LICENSE("Dual BSD/GPL");
MODULE_AUTHOR("The pvgpu developers");
MODULE_DESCRIPTION("Guest driver of pvgpu, a paravirtual GPU");
MODULE_VERSION(PVGPU_VERSION);
MODULE_SOFTDEP("pre: virtio_mmio");	/* for mmio= */
