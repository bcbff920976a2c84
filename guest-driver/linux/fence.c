// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Fences of the host as fences of this kernel, in sync files. The host is asked about one when somebody here is interested in
 * it for the first time; then its event signals it.
 */
#include <linux/dma-fence-unwrap.h>
#include <linux/dma-fence.h>
#include <linux/err.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/sync_file.h>
#include <linux/workqueue.h>

#include "pvgpu.h"

/* After how long to ask again when the host had no room for the question: first, and at most. */
#define PVGPU_ASK_AGAIN msecs_to_jiffies(10)
#define PVGPU_ASK_AGAIN_MAX msecs_to_jiffies(320)
/* In the fence's flags: somebody is interested. */
#define PVGPU_FENCE_WANTED DMA_FENCE_FLAG_USER_BITS

struct pvgpu_fence {
	struct dma_fence base;	/* first, for dma_fence_free(); its lock is the device's watch_lock */
	struct pvgpu_object *object;
	struct pvgpu_watch watch;
	struct delayed_work ask;	/* holds a reference of the fence */
	unsigned long again;	/* after how long */
	struct work_struct release;
};

static struct pvgpu_fence *pvgpu_fence(struct dma_fence *base)
{
	return container_of(base, struct pvgpu_fence, base);
}

static const char *pvgpu_fence_driver(struct dma_fence *base)
{
	return pvgpu_fence(base)->object->file.session->device->identity.name;
}

static const char *pvgpu_fence_timeline(struct dma_fence *base)
{
	return "pvgpu";
}

/* With the lock: events of the host's fence, or -errno. */
static void pvgpu_fence_end(struct pvgpu_fence *fence, int result)
{
	struct pvgpu_session *session = fence->object->file.session;

	if (test_bit(DMA_FENCE_FLAG_SIGNALED_BIT, &fence->base.flags))
		return;
	if (result < 0)
		dma_fence_set_error(&fence->base, max(result, -MAX_ERRNO));
	else if (!(result & POLLIN))
		dma_fence_set_error(&fence->base, -EIO);
	else if (!session->signaled && session->opens)
		session->signaled = pvgpu_object_get(fence->object);
	dma_fence_signal_locked(&fence->base);
}

/* With the lock, and before the fence is freed: pvgpu_fence_free() waits for the lock. */
static void pvgpu_fence_happened(struct pvgpu_watch *watch, int result)
{
	pvgpu_fence_end(container_of(watch, struct pvgpu_fence, watch), result);
}

static void pvgpu_fence_ask(struct work_struct *work)
{
	struct pvgpu_fence *fence = container_of(to_delayed_work(work), struct pvgpu_fence, ask);
	int result = pvgpu_watch(&fence->object->file, &fence->watch, POLLIN);

	if (result == -EAGAIN || result == -ENOMEM) {
		queue_delayed_work(pvgpu_workqueue, &fence->ask, fence->again);
		fence->again = min(2 * fence->again, PVGPU_ASK_AGAIN_MAX);
		return;
	}
	if (result) {
		spin_lock_irq(fence->base.lock);
		pvgpu_fence_end(fence, result);
		spin_unlock_irq(fence->base.lock);
	}
	dma_fence_put(&fence->base);
}

static bool pvgpu_fence_want(struct dma_fence *base)
{
	if (!test_and_set_bit(PVGPU_FENCE_WANTED, &base->flags)) {
		dma_fence_get(base);
		queue_delayed_work(pvgpu_workqueue, &pvgpu_fence(base)->ask, 0);
	}
	return true;
}

/* Who asks for the state of a fence wants to see it signaled some time, even if nobody waits for it. */
static bool pvgpu_fence_signaled(struct dma_fence *base)
{
	pvgpu_fence_want(base);
	return false;
}

/* Maybe with locks, maybe in an interrupt. */
static void pvgpu_fence_release(struct dma_fence *base)
{
	queue_work(pvgpu_workqueue, &pvgpu_fence(base)->release);
}

static void pvgpu_fence_free(struct work_struct *work)
{
	struct pvgpu_fence *fence = container_of(work, struct pvgpu_fence, release);

	pvgpu_watch_cancel(fence->object->file.session, &fence->watch);
	pvgpu_object_put(fence->object);
	dma_fence_free(&fence->base);
	/* The module waits for the end of this before it goes. */
	module_put(THIS_MODULE);
}

static const struct dma_fence_ops pvgpu_fence_operations = {
	.get_driver_name = pvgpu_fence_driver,
	.get_timeline_name = pvgpu_fence_timeline,
	.enable_signaling = pvgpu_fence_want,
	.signaled = pvgpu_fence_signaled,
	.release = pvgpu_fence_release,
};

struct file *pvgpu_fence_file(struct pvgpu_object *object)
{
	struct pvgpu_fence *fence = kzalloc(sizeof(*fence), GFP_KERNEL);
	struct sync_file *sync_file;

	if (!fence)
		return ERR_PTR(-ENOMEM);
	/* The sync file is the kernel's own and does not keep this module. */
	__module_get(THIS_MODULE);
	fence->object = pvgpu_object_get(object);
	fence->watch.happened = pvgpu_fence_happened;
	INIT_DELAYED_WORK(&fence->ask, pvgpu_fence_ask);
	fence->again = PVGPU_ASK_AGAIN;
	INIT_WORK(&fence->release, pvgpu_fence_free);
	/* The host's fences signal in any order, so each has a context of its own. */
	dma_fence_init(&fence->base, &pvgpu_fence_operations, &object->file.session->device->watch_lock,
		       dma_fence_context_alloc(1), 1);
	sync_file = sync_file_create(&fence->base);
	dma_fence_put(&fence->base);
	return sync_file ? sync_file->file : ERR_PTR(-ENOMEM);
}

static bool pvgpu_fence_is_of(struct dma_fence *base, struct pvgpu_session *session)
{
	return base->ops == &pvgpu_fence_operations && pvgpu_fence(base)->object->file.session == session;
}

/* The host takes one fence of its own. What else a sync file has, merged or of other drivers, is waited for here. */
struct pvgpu_object *pvgpu_fence_object(struct pvgpu_session *session, int fd)
{
	struct dma_fence *whole = sync_file_get_fence(fd), *fence;
	struct pvgpu_object *object = NULL;
	struct dma_fence_unwrap cursor;
	int error = 0;

	if (!whole)
		return ERR_PTR(-EINVAL);
	dma_fence_unwrap_for_each(fence, &cursor, whole) {
		if (error)
			continue;
		if (!object && pvgpu_fence_is_of(fence, session))
			object = pvgpu_object_get(pvgpu_fence(fence)->object);
		else
			error = dma_fence_wait(fence, true);
	}
	dma_fence_put(whole);
	if (error) {
		if (object)
			pvgpu_object_put(object);
		return ERR_PTR(error);
	}
	if (!object) {
		/* All are signaled, so any of the host's stands for them that is. */
		spin_lock_irq(&session->device->watch_lock);
		if (session->signaled)
			object = pvgpu_object_get(session->signaled);
		spin_unlock_irq(&session->device->watch_lock);
	}
	return object ?: ERR_PTR(-EOPNOTSUPP);
}

void pvgpu_fence_forget_signaled(struct pvgpu_session *session)
{
	struct pvgpu_object *object;

	spin_lock_irq(&session->device->watch_lock);
	object = session->signaled;
	session->signaled = NULL;
	spin_unlock_irq(&session->device->watch_lock);
	if (object)
		pvgpu_object_put(object);
}
