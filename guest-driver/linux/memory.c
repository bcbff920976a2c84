// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Memory of the node: mmap shows a process a range of the aperture, page by page as it is touched. A range is mapped on the
 * host as long as there is a VMA of it.
 *
 * A device without an aperture may take pages of this kernel instead: it copies between them and the object when an ioctl that
 * is for that comes by. Then mappings of one range share their pages, since a program expects no less.
 *
 * The aperture is memory of the host, coherent and cached there: a process maps it cached, too. x86 allows that for what is not
 * RAM to it only where the MTRRs say write-back and where the range is reserved as such, and falls back to uncached otherwise.
 */
#include <linux/io.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/srcu.h>
#include <linux/version.h>
#include <drm/drm_device.h>

#include "pvgpu.h"

#define PVGPU_APERTURE_REGION 0

/* Protections of the protocol (protocol/src/wire.rs). */
#define PVGPU_PROTECTION_READ 1
#define PVGPU_PROTECTION_WRITE 2

/* How many pages a fault maps at once, at most: a page table. */
#define PVGPU_FAULT_PAGES PTRS_PER_PTE

/* Faults that may be about to map something. */
DEFINE_STATIC_SRCU(pvgpu_faults);

/* A range of an object, as long as there is a VMA of it. */
struct pvgpu_mapping {
	struct kref references;
	struct pvgpu_session *session;
	u64 aperture_offset, length;	/* with pages, the first is the host's number of it */
	pgoff_t start;	/* what vm_pgoff of the first VMA was: where in the object the range starts */
	struct page **pages;		/* NULL in the aperture, and then nothing of what follows is used */
	int object;
	bool writable;
	struct list_head link;		/* in the device's mappings */
	struct llist_node lost;		/* in its lost ones */
};

void pvgpu_memory_init(struct pvgpu *device)
{
	mutex_init(&device->mappings_lock);
	INIT_LIST_HEAD(&device->mappings);
	init_llist_head(&device->lost_mappings);
}

/* Finds the aperture, if there is one, and reserves it as cached memory for as long as the driver is bound. */
void pvgpu_memory_find(struct pvgpu *device)
{
	struct device *parent = &device->virtio->dev;

	if (!virtio_get_shm_region(device->virtio, &device->aperture, PVGPU_APERTURE_REGION)) {
		device->aperture.len = 0;
		return;
	}
	if (IS_ERR(devm_memremap(parent, device->aperture.addr, device->aperture.len, MEMREMAP_WB))) {
		dev_err(parent, "cannot reserve the aperture: no mmap\n");
		device->aperture.len = 0;
	}
}

/* Whether the device takes pages. It knows no other addresses than this kernel does, so it must not be behind an IOMMU. */
static bool pvgpu_takes_pages(const struct pvgpu_session *session)
{
	return !session->device->aperture.len && session->pages && virtio_has_dma_quirk(session->device->virtio);
}

static void pvgpu_mapping_free(struct pvgpu_mapping *mapping)
{
	unsigned long index, count = mapping->pages ? mapping->length >> PAGE_SHIFT : 0;

	for (index = 0; index < count && mapping->pages[index]; index++)
		__free_page(mapping->pages[index]);
	kvfree(mapping->pages);
	kfree(mapping);
}

/* Frees what nobody sees any more, unless the host may still write it: then that waits for the end of the device. */
static void pvgpu_mapping_give_up(struct pvgpu_mapping *mapping, bool unmapped)
{
	if (!mapping->pages || unmapped)
		pvgpu_mapping_free(mapping);
	else
		llist_add(&mapping->lost, &mapping->session->device->lost_mappings);
}

void pvgpu_memory_free(struct pvgpu *device)
{
	struct pvgpu_mapping *mapping, *next;

	llist_for_each_entry_safe(mapping, next, llist_del_all(&device->lost_mappings), lost)
		pvgpu_mapping_free(mapping);
}

static void pvgpu_mapping_release(struct kref *references)
{
	struct pvgpu_mapping *mapping = container_of(references, struct pvgpu_mapping, references);
	struct pvgpu_session *session = mapping->session;
	struct pvgpu *device = session->device;
	struct drm_device *node = device->node;
	int error;

	if (mapping->pages) {
		mutex_lock(&device->mappings_lock);
		list_del(&mapping->link);
		mutex_unlock(&device->mappings_lock);
	}
	error = pvgpu_rust_unmap(session, session->host, mapping->aperture_offset, mapping->length);
	pvgpu_mapping_give_up(mapping, !error);
	pvgpu_session_put(session);
	drm_dev_put(node);
}

/*
 * Pages for the whole range, in pieces as large as can be had at once. A program may ask for any length, and hears only of the
 * host that there is no such object: nobody else is to be killed for that.
 */
static int pvgpu_pages_allocate(struct pvgpu_mapping *mapping)
{
	unsigned long count = mapping->length >> PAGE_SHIFT, done = 0, index;
	unsigned int order = PMD_SHIFT - PAGE_SHIFT;

	mapping->pages = kvcalloc(count, sizeof(*mapping->pages), GFP_KERNEL_ACCOUNT);
	if (!mapping->pages)
		return -ENOMEM;
	while (done < count) {
		gfp_t flags = GFP_HIGHUSER | __GFP_ZERO | __GFP_ACCOUNT | __GFP_NOWARN;
		struct page *page;

		if (fatal_signal_pending(current))
			return -EINTR;
		order = min_t(unsigned int, order, ilog2(count - done));
		page = alloc_pages(flags | (order ? __GFP_NORETRY : __GFP_RETRY_MAYFAIL), order);
		if (!page && !order)
			return -ENOMEM;
		if (!page) {
			order--;
			continue;
		}
		split_page(page, order);
		for (index = 0; index < 1UL << order; index++)
			mapping->pages[done++] = page + index;
		cond_resched();
	}
	return 0;
}

/* Where the pages are, for the host. Gives how many ranges, or -errno. */
static int pvgpu_pages_ranges(const struct pvgpu_mapping *mapping, struct pvgpu_range **ranges)
{
	unsigned long count = mapping->length >> PAGE_SHIFT, index;
	u32 found = 0;
	int pass;

	*ranges = NULL;
	/* The first pass counts. */
	for (pass = 0; pass < 2; pass++) {
		struct pvgpu_range *range = *ranges;

		found = 0;
		for (index = 0; index < count; index++) {
			u64 address = page_to_phys(mapping->pages[index]);

			if (index && page_to_phys(mapping->pages[index - 1]) + PAGE_SIZE == address) {
				if (pass)
					le64_add_cpu(&range[found - 1].length, PAGE_SIZE);
				continue;
			}
			if (pass)
				range[found] = (struct pvgpu_range){ cpu_to_le64(address), cpu_to_le64(PAGE_SIZE) };
			found++;
		}
		if (pass)
			break;
		*ranges = kvmalloc_array(found, sizeof(**ranges), GFP_KERNEL_ACCOUNT);
		if (!*ranges)
			return -ENOMEM;
	}
	return found;
}

/* A VMA is copied by fork, and when munmap or mremap split or move one. */
static void pvgpu_vma_open(struct vm_area_struct *vma)
{
	struct pvgpu_mapping *mapping = vma->vm_private_data;

	kref_get(&mapping->references);
}

static void pvgpu_vma_close(struct vm_area_struct *vma)
{
	struct pvgpu_mapping *mapping = vma->vm_private_data;

	kref_put(&mapping->references, pvgpu_mapping_release);
}

/* The page frame that shows a page of the object. */
static unsigned long pvgpu_mapping_frame(const struct pvgpu_mapping *mapping, pgoff_t offset)
{
	pgoff_t index = offset - mapping->start;

	if (mapping->pages)
		return page_to_pfn(mapping->pages[index]);
	return PHYS_PFN(mapping->session->device->aperture.addr + mapping->aperture_offset) + index;
}

static vm_fault_t pvgpu_vma_fault(struct vm_fault *fault)
{
	struct vm_area_struct *vma = fault->vma;
	struct pvgpu_mapping *mapping = vma->vm_private_data;
	unsigned long address, end;
	vm_fault_t result = VM_FAULT_SIGBUS;
	int faults = srcu_read_lock(&pvgpu_faults);

	/* Not after the session's mappings were taken from all processes: pvgpu_memory_forget() waits for this. */
	if (pvgpu_session_over(mapping->session))
		goto unlock;
	/* The page that was touched, then its neighbours as far as they share its page table; these may fail. */
	result = vmf_insert_pfn(vma, fault->address & PAGE_MASK, pvgpu_mapping_frame(mapping, fault->pgoff));
	address = max(vma->vm_start, fault->address & PMD_MASK);
	end = min(vma->vm_end, (fault->address & PMD_MASK) + PVGPU_FAULT_PAGES * PAGE_SIZE);
	for (; result == VM_FAULT_NOPAGE && address < end; address += PAGE_SIZE) {
		pgoff_t offset = vma->vm_pgoff + ((address - vma->vm_start) >> PAGE_SHIFT);

		if (vmf_insert_pfn(vma, address, pvgpu_mapping_frame(mapping, offset)) != VM_FAULT_NOPAGE)
			break;
	}
unlock:
	srcu_read_unlock(&pvgpu_faults, faults);
	return result;
}

static const struct vm_operations_struct pvgpu_vma_operations = {
	.open = pvgpu_vma_open,
	.close = pvgpu_vma_close,
	.fault = pvgpu_vma_fault,
};

void pvgpu_memory_forget(struct pvgpu *device)
{
	synchronize_srcu(&pvgpu_faults);
	unmap_mapping_range(device->node->anon_inode->i_mapping, 0, 0, 1);
}

static int pvgpu_map_range(struct pvgpu_file *file, struct pvgpu_mapping *mapping, u32 protection)
{
	struct pvgpu_session *session = file->session;
	u64 offset = (u64)mapping->start << PAGE_SHIFT;
	struct pvgpu_range *ranges;
	int result;

	if (!mapping->pages)
		return pvgpu_rust_map(session, session->host, file->object, offset, mapping->length, protection,
				      &mapping->aperture_offset);
	result = pvgpu_pages_ranges(mapping, &ranges);
	if (result > 0)
		result = pvgpu_rust_map_pages(session, session->host, file->object, offset, mapping->length, protection,
					      ranges, result, &mapping->aperture_offset);
	kvfree(ranges);
	return result;
}

/*
 * Maps on the host what the VMA is to show. A program may make a mapping that it only reads writable later, if its file allows
 * that; then the host is asked for both at once, and if it has only the one to give, so does this node.
 */
static int pvgpu_map_on_host(struct pvgpu_file *file, struct vm_area_struct *vma, struct pvgpu_mapping *mapping)
{
	int error;

	if (vma->vm_flags & VM_MAYWRITE) {
		mapping->writable = true;
		error = pvgpu_map_range(file, mapping, PVGPU_PROTECTION_READ | PVGPU_PROTECTION_WRITE);
		if ((error != -EACCES && error != -EPERM) || (vma->vm_flags & VM_WRITE))
			return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
		vm_flags_clear(vma, VM_MAYWRITE);
#else
		vma->vm_flags &= ~VM_MAYWRITE;
#endif
	}
	mapping->writable = false;
	return pvgpu_map_range(file, mapping, PVGPU_PROTECTION_READ);
}

/* A mapping with pages that shows the range already, with a reference; or NULL. With the lock. */
static struct pvgpu_mapping *pvgpu_mapping_find(struct pvgpu_file *file, struct vm_area_struct *vma)
{
	struct pvgpu_mapping *mapping;

	list_for_each_entry(mapping, &file->session->device->mappings, link) {
		if (mapping->session != file->session || mapping->object != file->object || vma->vm_pgoff < mapping->start ||
		    vma->vm_pgoff + vma_pages(vma) > mapping->start + (mapping->length >> PAGE_SHIFT))
			continue;
		if ((mapping->writable || !(vma->vm_flags & VM_MAYWRITE)) && kref_get_unless_zero(&mapping->references))
			return mapping;
	}
	return NULL;
}

/* A new mapping of what the VMA is to show. */
static struct pvgpu_mapping *pvgpu_mapping_new(struct pvgpu_file *file, struct vm_area_struct *vma)
{
	struct pvgpu_session *session = file->session;
	struct pvgpu *device = session->device;
	struct pvgpu_mapping *mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	int error = 0;

	if (!mapping)
		return ERR_PTR(-ENOMEM);
	kref_init(&mapping->references);
	mapping->session = session;
	mapping->length = vma->vm_end - vma->vm_start;
	mapping->start = vma->vm_pgoff;
	mapping->object = file->object;
	if (pvgpu_takes_pages(session))
		error = pvgpu_pages_allocate(mapping);
	if (!error)
		error = pvgpu_map_on_host(file, vma, mapping);
	if (error)
		goto free;
	if (mapping->pages)
		goto keep;
	/* The Rust half has checked against the host's word, this is against the region itself. */
	if (PAGE_ALIGNED(mapping->aperture_offset) && mapping->aperture_offset <= device->aperture.len &&
	    mapping->length <= device->aperture.len - mapping->aperture_offset)
		goto keep;
	error = -EPROTO;
	pvgpu_rust_unmap(session, session->host, mapping->aperture_offset, mapping->length);
free:
	/* A host that has not answered may have mapped it. */
	pvgpu_mapping_give_up(mapping, error != -EIO);
	return ERR_PTR(error);
keep:
	pvgpu_session_get(session);
	drm_dev_get(device->node);
	return mapping;
}

/* With pages: one mapping for all VMAs that show the same. */
static struct pvgpu_mapping *pvgpu_mapping_get(struct pvgpu_file *file, struct vm_area_struct *vma)
{
	struct pvgpu_session *session = file->session;
	struct pvgpu *device = session->device;
	struct pvgpu_mapping *mapping;

	if (!pvgpu_takes_pages(session))
		return pvgpu_mapping_new(file, vma);
	if (mutex_lock_killable(&device->mappings_lock))
		return ERR_PTR(-EINTR);
	mapping = pvgpu_mapping_find(file, vma);
	if (!mapping) {
		mapping = pvgpu_mapping_new(file, vma);
		if (!IS_ERR(mapping))
			list_add(&mapping->link, &device->mappings);
	}
	mutex_unlock(&device->mappings_lock);
	return mapping;
}

int pvgpu_map(struct pvgpu_file *file, struct vm_area_struct *vma)
{
	struct pvgpu_mapping *mapping;

	if (pvgpu_session_over(file->session))
		return -ENODEV;
	/* As the kernel's own drivers: memory of a GPU has no private copies. */
	if ((vma->vm_flags & (VM_SHARED | VM_MAYWRITE)) == VM_MAYWRITE)
		return -EINVAL;
	mapping = pvgpu_mapping_get(file, vma);
	if (IS_ERR(mapping))
		return PTR_ERR(mapping);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_set(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
#else
	vma->vm_flags |= VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP;
#endif
	vma->vm_private_data = mapping;
	vma->vm_ops = &pvgpu_vma_operations;
	return 0;
}
