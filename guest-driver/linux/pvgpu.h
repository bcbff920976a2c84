/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * What the two halves of the module are to each other. driver.c has the device and its queues, event.c its event queue, node.c
 * the DRM node, memory.c its mmap, object.c, buffer.c and fence.c what ioctls give out as file descriptors; the Rust half (src/)
 * has the protocol, and knows what every operation means. src/kernel.rs and src/entry.rs repeat these declarations.
 */
#ifndef PVGPU_H
#define PVGPU_H

#include <linux/completion.h>
#include <linux/hashtable.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/llist.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <drm/drm_drv.h>

struct pvgpu;
struct pvgpu_host;	/* the Rust half's own, of one session */

/* The host driver, as the node is to report it. */
struct pvgpu_identity {
	char name[33];
	int version[3];
	bool pages;	/* whether the host can do with pages of this kernel instead */
};

/* Pages of this kernel (protocol/src/wire.rs, PageRange). */
struct pvgpu_range {
	__le64 address, length;
};

/* What a file descriptor is of (protocol/src/schema.rs, Descriptor). */
enum pvgpu_descriptor {
	PVGPU_DMA_BUF,
	PVGPU_SYNC_FILE,
	PVGPU_SYNCOBJ,
	PVGPU_EVENTFD,
};

/*
 * A session with the host's GPU: from a hello until the device is gone, or the host has lost it. What is opened later has the
 * next one. Whatever was made in it keeps it, and after its end has no way to the host any more: the numbers of its objects
 * may be those of others in the next one.
 */
struct pvgpu_session {
	struct kref references;
	struct pvgpu *device;
	struct pvgpu_host *host;
	bool pages;	/* whether the host can do with pages of this kernel instead of an aperture */
	bool lost;	/* the host has said so */
	/* With the device's watch_lock: */
	unsigned int opens;		/* of the node */
	struct pvgpu_object *signaled;	/* some fence that is, while there are any */
};

/* Something with an object of a session behind it: an open of the node, or a file descriptor that an ioctl gave. */
struct pvgpu_file {
	struct pvgpu_session *session;
	int object;
};

/* An object that an ioctl gave. It is closed with its last reference. */
struct pvgpu_object {
	struct pvgpu_file file;
	struct kref references;
};

/* Who wants to hear when an object is ready; zeroed at first. */
struct pvgpu_watch {
	struct hlist_node link;		/* in the device's watches, until it has happened */
	u64 id;
	/* With the device's watch_lock, maybe in an interrupt: events (zero when there are none yet), or -errno. */
	void (*happened)(struct pvgpu_watch *watch, int result);
};

/* One request queue. */
struct pvgpu_queue {
	spinlock_t lock;	/* the virtqueue, all that follows, and the state of the messages in it */
	struct pvgpu_session *session;	/* whose requests it takes; there is no ring without one */
	struct virtqueue *ring;
	bool submitted;		/* since the last doorbell */
	unsigned int in_flight;
	unsigned long returned;	/* how many came back, ever */
	wait_queue_head_t room;	/* who waits for room in the ring */
	struct llist_head abandoned;	/* messages that came back and that nobody wants; needs no lock */
};

/* What ends a wait before the device does. */
enum pvgpu_patience {
	PVGPU_INTERRUPTIBLE,	/* any signal */
	PVGPU_KILLABLE,		/* a fatal one */
	PVGPU_SOON_ONLY,	/* none, but some seconds */
	PVGPU_HELLO,		/* a fatal one, or some seconds, or the device needs a reset */
	PVGPU_AT_ONCE,		/* there is no wait: the answer is nobody's */
};

/* One device. Freed when the node's last file is closed, which may be long after the device is gone. */
struct pvgpu {
	struct virtio_device *virtio;
	struct virtio_shm_region aperture;
	struct pvgpu_identity identity;
	struct mutex starting;		/* held to start a session, and to end it */
	struct pvgpu_session *session;	/* for what is opened now, if there is one; with the mutex */
	unsigned int attempts;		/* to start one */
	bool dead;			/* there will be no other */
	struct delayed_work attend;
	unsigned long returned, patience;	/* for pvgpu_attend() alone */
	struct drm_driver driver;
	struct drm_device *node;
	struct platform_device *parent;
	atomic64_t last_id;
	unsigned int queue_count;
	struct pvgpu_queue *queues;
	struct mutex mappings_lock;	/* the list of mappings with pages, also while one is made */
	struct list_head mappings;
	struct llist_head lost_mappings;	/* what the host may still write; needs no lock */
	spinlock_t watch_lock;		/* all that follows, and the fences */
	struct virtqueue *event_ring;
	struct pvgpu_event *events;
	DECLARE_HASHTABLE(watches, 6);
};

/* One request with its response. */
struct pvgpu_message {
	struct pvgpu_session *session;
	struct pvgpu_queue *queue;
	enum { PVGPU_FILLING, PVGPU_IN_FLIGHT, PVGPU_ABANDONED, PVGPU_COMPLETE, PVGPU_LOST } state;
	size_t request, response, written;
	size_t response_offset;
	struct completion done;
	struct llist_node abandoned;
	u8 *bytes;	/* request and response: inside, or several pages */
	u8 inside[] __aligned(64);
};

/* node.c; device->node is there after an error, too, if it got so far. */
int pvgpu_node_register(struct pvgpu *device);
void pvgpu_node_remove(struct pvgpu *device);

/* memory.c */
void pvgpu_memory_init(struct pvgpu *device);
void pvgpu_memory_find(struct pvgpu *device);
/* After the device was reset. */
void pvgpu_memory_free(struct pvgpu *device);
int pvgpu_map(struct pvgpu_file *file, struct vm_area_struct *vma);
/* When a session is over: takes its mappings from all processes. */
void pvgpu_memory_forget(struct pvgpu *device);

/* driver.c, for the others */
void pvgpu_free(struct pvgpu *device);
/* The session for what is opened now, with a reference, or an error. A new one if the former is lost. */
struct pvgpu_session *pvgpu_session_now(struct pvgpu *device);
/* With the last put, nothing of it must be left. */
struct pvgpu_session *pvgpu_session_get(struct pvgpu_session *session);
void pvgpu_session_put(struct pvgpu_session *session);
/* Whether it has ended. */
bool pvgpu_session_over(const struct pvgpu_session *session);
/* Something waits for the host: from now on somebody looks whether the host still knows the session. */
void pvgpu_session_waits(struct pvgpu_session *session);
/* For all that sleeps and is nobody's call. */
extern struct workqueue_struct *pvgpu_workqueue;

/* event.c: the queue with the device's life, and watches. */
void pvgpu_event_init(struct pvgpu *device);
int pvgpu_event_start(struct pvgpu *device);
void pvgpu_event_used(struct virtqueue *ring);
void pvgpu_event_stop(struct pvgpu *device);
/* Events that are there, -errno, or zero: then the watch happens some time. Process context. */
int pvgpu_watch(const struct pvgpu_file *file, struct pvgpu_watch *watch, u32 events);
/* Whether it has not happened yet. */
bool pvgpu_watching(struct pvgpu *device, struct pvgpu_watch *watch);
/* It does not happen any more. Process context. */
void pvgpu_watch_cancel(struct pvgpu_session *session, struct pvgpu_watch *watch);

/* object.c. The last put sleeps. */
struct pvgpu_object *pvgpu_object_get(struct pvgpu_object *object);
void pvgpu_object_put(struct pvgpu_object *object);

/* buffer.c and fence.c: the file of an object, which takes a reference; and a reference to the object of a file. */
struct file *pvgpu_buffer_file(struct pvgpu_object *object, int access);
struct pvgpu_object *pvgpu_buffer_object(struct pvgpu_session *session, int fd);
struct file *pvgpu_fence_file(struct pvgpu_object *object);
struct pvgpu_object *pvgpu_fence_object(struct pvgpu_session *session, int fd);
/* Lets session->signaled go. */
void pvgpu_fence_forget_signaled(struct pvgpu_session *session);

/* The Rust half: 0 or more, or -errno. Process context only. */
struct pvgpu_host *pvgpu_rust_connect(struct pvgpu_session *session, struct pvgpu_identity *identity, int *error);
int pvgpu_rust_open(struct pvgpu_session *session, const struct pvgpu_host *host, u32 flags);
int pvgpu_rust_close(struct pvgpu_session *session, const struct pvgpu_host *host, int object);
int pvgpu_rust_ioctl(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u32 command, u64 address);
int pvgpu_rust_map(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u64 offset, u64 length,
		   u32 protection, u64 *aperture_offset);
int pvgpu_rust_map_pages(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u64 offset, u64 length,
			 u32 protection, const struct pvgpu_range *ranges, u32 count, u64 *number);
int pvgpu_rust_unmap(struct pvgpu_session *session, const struct pvgpu_host *host, u64 aperture_offset, u64 length);
int pvgpu_rust_read(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u64 address, u64 length);
int pvgpu_rust_wait(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u32 events);
int pvgpu_rust_watch(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u64 id, u32 events);
int pvgpu_rust_ask(struct pvgpu_session *session, const struct pvgpu_host *host);
int pvgpu_rust_cancel(struct pvgpu_session *session, const struct pvgpu_host *host, u64 id);
int pvgpu_rust_size(struct pvgpu_session *session, const struct pvgpu_host *host, int object, u64 *size);

/* What the Rust half calls; src/kernel.rs says what each does. */
void pvgpu_print(const char *text, size_t length);
void pvgpu_bug(void);
void *pvgpu_allocate(size_t length);
int pvgpu_copy_from_user(void *target, u64 source, size_t length);
int pvgpu_copy_to_user(u64 target, const void *source, size_t length);
int pvgpu_fd_object(struct pvgpu_session *session, int fd, int descriptor, struct pvgpu_object **object);
int pvgpu_object_fd(struct pvgpu_session *session, int id, int descriptor, u32 flags);
struct pvgpu_message *pvgpu_message_new(size_t request, size_t response);
void *pvgpu_message_request(struct pvgpu_message *message);
const void *pvgpu_message_response(const struct pvgpu_message *message);
size_t pvgpu_message_room(const struct pvgpu_message *message);
size_t pvgpu_message_written(const struct pvgpu_message *message);
int pvgpu_message_submit(struct pvgpu_message *message, struct pvgpu_session *session, struct pvgpu_queue *queue,
			 size_t length, enum pvgpu_patience patience);
bool pvgpu_message_complete(struct pvgpu_message *message);
int pvgpu_message_wait(struct pvgpu_message *message, enum pvgpu_patience patience);
void pvgpu_message_end(struct pvgpu_message *message);
struct pvgpu_queue *pvgpu_queue_here(struct pvgpu_session *session);
void pvgpu_queue_doorbell(struct pvgpu_queue *queue);
u64 pvgpu_take_ids(struct pvgpu_session *session, u32 count);
u64 pvgpu_now_ns(void);

#endif
