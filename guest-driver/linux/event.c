// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The event queue, on which the host says that an object which is watched has become ready.
 */
#include <linux/slab.h>

#include "pvgpu.h"

#define PVGPU_EVENTS 64

/* One event (protocol/src/wire.rs). */
struct pvgpu_event {
	__le64 id;
	__le32 events;
	__le32 reserved;
};

void pvgpu_event_init(struct pvgpu *device)
{
	spin_lock_init(&device->watch_lock);
	hash_init(device->watches);
}

/* Gives a buffer to the device; with the lock. */
static void pvgpu_event_offer(struct pvgpu *device, struct pvgpu_event *event)
{
	struct scatterlist list;

	sg_init_one(&list, event, sizeof(*event));
	/* There is room, since the ring is as long as there are buffers; one that is broken gives no events anyway. */
	virtqueue_add_inbuf(device->event_ring, &list, 1, event, GFP_ATOMIC);
}

int pvgpu_event_start(struct pvgpu *device)
{
	unsigned int count = min_t(unsigned int, PVGPU_EVENTS, virtqueue_get_vring_size(device->event_ring)), index;

	device->events = kcalloc(count, sizeof(*device->events), GFP_KERNEL);
	if (!device->events)
		return -ENOMEM;
	spin_lock_irq(&device->watch_lock);
	for (index = 0; index < count; index++)
		pvgpu_event_offer(device, &device->events[index]);
	spin_unlock_irq(&device->watch_lock);
	virtqueue_kick(device->event_ring);
	return 0;
}

/* Ends a watch; with the lock. */
static void pvgpu_watch_happened(struct pvgpu_watch *watch, int result)
{
	hash_del(&watch->link);
	watch->happened(watch, result);
}

/* The device's interrupt. */
void pvgpu_event_used(struct virtqueue *ring)
{
	struct pvgpu *device = ring->vdev->priv;
	struct pvgpu_event *event;
	struct pvgpu_watch *watch;
	unsigned int written;
	unsigned long flags;
	bool notify;

	spin_lock_irqsave(&device->watch_lock, flags);
	do {
		virtqueue_disable_cb(ring);
		while ((event = virtqueue_get_buf(ring, &written))) {
			u64 id = le64_to_cpu(event->id);

			/* An id that nobody has: of a watch that was given up meanwhile, or the host's mistake. */
			hash_for_each_possible(device->watches, watch, link, id) {
				if (written >= sizeof(*event) && watch->id == id) {
					pvgpu_watch_happened(watch, le32_to_cpu(event->events) & INT_MAX);
					break;
				}
			}
			pvgpu_event_offer(device, event);
		}
	} while (!virtqueue_enable_cb(ring));
	notify = virtqueue_kick_prepare(ring);
	spin_unlock_irqrestore(&device->watch_lock, flags);
	if (notify)
		virtqueue_notify(ring);
}

/* After the device was reset. */
void pvgpu_event_stop(struct pvgpu *device)
{
	struct pvgpu_watch *watch;
	struct hlist_node *next;
	unsigned int bucket, written;

	spin_lock_irq(&device->watch_lock);
	/* An interrupt that is still under way finds nothing. */
	while (virtqueue_get_buf(device->event_ring, &written))
		;
	while (virtqueue_detach_unused_buf(device->event_ring))
		;
	hash_for_each_safe(device->watches, bucket, next, watch, link)
		pvgpu_watch_happened(watch, -ENODEV);
	spin_unlock_irq(&device->watch_lock);
	kfree(device->events);
	device->events = NULL;
}

bool pvgpu_watching(struct pvgpu *device, struct pvgpu_watch *watch)
{
	unsigned long flags;
	bool watching;

	spin_lock_irqsave(&device->watch_lock, flags);
	watching = hash_hashed(&watch->link);
	spin_unlock_irqrestore(&device->watch_lock, flags);
	return watching;
}

/* Whether there was something to forget. */
static bool pvgpu_watch_forget(struct pvgpu *device, struct pvgpu_watch *watch)
{
	bool watching;

	spin_lock_irq(&device->watch_lock);
	watching = hash_hashed(&watch->link);
	if (watching)
		hash_del(&watch->link);
	spin_unlock_irq(&device->watch_lock);
	return watching;
}

int pvgpu_watch(const struct pvgpu_file *file, struct pvgpu_watch *watch, u32 events)
{
	struct pvgpu_session *session = file->session;
	struct pvgpu *device = session->device;
	int result;

	watch->id = pvgpu_take_ids(session, 1) + 1;
	/* The event may come before the answer. */
	spin_lock_irq(&device->watch_lock);
	hash_add(device->watches, &watch->link, watch->id);
	spin_unlock_irq(&device->watch_lock);
	result = pvgpu_rust_watch(session, session->host, file->object, watch->id, events);
	pvgpu_session_waits(session);
	if (result && !pvgpu_watch_forget(device, watch))
		return 0;
	return result;
}

void pvgpu_watch_cancel(struct pvgpu_session *session, struct pvgpu_watch *watch)
{
	if (pvgpu_watch_forget(session->device, watch))
		pvgpu_rust_cancel(session, session->host, watch->id);
}
