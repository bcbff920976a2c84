// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Memory of the node: mmap shows a process a range of the aperture, page by page as it is touched. A range is mapped on the
 * host as long as there is a VMA of it.
 *
 * The aperture is memory of the host, coherent and cached there: a process maps it cached, too. x86 allows that for what is not
 * RAM to it only where the MTRRs say write-back and where the range is reserved as such, and falls back to uncached otherwise.
 */
#include <linux/io.h>
#include <linux/mm.h>
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

/* A range of an object in the aperture, as long as there is a VMA of it. */
struct pvgpu_mapping {
	struct kref references;
	struct pvgpu_session *session;
	u64 aperture_offset, length;
	pgoff_t start;	/* what vm_pgoff of the first VMA was: where in the object the range starts */
};

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

static void pvgpu_mapping_release(struct kref *references)
{
	struct pvgpu_mapping *mapping = container_of(references, struct pvgpu_mapping, references);
	struct pvgpu_session *session = mapping->session;
	struct drm_device *node = session->device->node;

	pvgpu_rust_unmap(session, session->host, mapping->aperture_offset, mapping->length);
	pvgpu_session_put(session);
	drm_dev_put(node);
	kfree(mapping);
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

static vm_fault_t pvgpu_vma_fault(struct vm_fault *fault)
{
	struct vm_area_struct *vma = fault->vma;
	struct pvgpu_mapping *mapping = vma->vm_private_data;
	struct pvgpu *device = mapping->session->device;
	unsigned long page = PHYS_PFN(device->aperture.addr + mapping->aperture_offset);
	unsigned long address, end;
	vm_fault_t result = VM_FAULT_SIGBUS;
	int faults = srcu_read_lock(&pvgpu_faults);

	/* Not after the session's mappings were taken from all processes: pvgpu_memory_forget() waits for this. */
	if (pvgpu_session_over(mapping->session))
		goto unlock;
	/* The page that was touched, then its neighbours as far as they share its page table; these may fail. */
	result = vmf_insert_pfn(vma, fault->address & PAGE_MASK, page + fault->pgoff - mapping->start);
	address = max(vma->vm_start, fault->address & PMD_MASK);
	end = min(vma->vm_end, (fault->address & PMD_MASK) + PVGPU_FAULT_PAGES * PAGE_SIZE);
	for (; result == VM_FAULT_NOPAGE && address < end; address += PAGE_SIZE) {
		pgoff_t offset = vma->vm_pgoff + ((address - vma->vm_start) >> PAGE_SHIFT);

		if (vmf_insert_pfn(vma, address, page + offset - mapping->start) != VM_FAULT_NOPAGE)
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

/*
 * Maps on the host what the VMA is to show. A program may make a mapping that it only reads writable later, if its file allows
 * that; then the host is asked for both at once, and if it has only the one to give, so does this node.
 */
static int pvgpu_map_on_host(struct pvgpu_file *file, struct vm_area_struct *vma, u64 length, u64 *aperture_offset)
{
	struct pvgpu_session *session = file->session;
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	int error;

	if (vma->vm_flags & VM_MAYWRITE) {
		error = pvgpu_rust_map(session, session->host, file->object, offset, length,
				       PVGPU_PROTECTION_READ | PVGPU_PROTECTION_WRITE, aperture_offset);
		if ((error != -EACCES && error != -EPERM) || (vma->vm_flags & VM_WRITE))
			return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
		vm_flags_clear(vma, VM_MAYWRITE);
#else
		vma->vm_flags &= ~VM_MAYWRITE;
#endif
	}
	return pvgpu_rust_map(session, session->host, file->object, offset, length, PVGPU_PROTECTION_READ, aperture_offset);
}

int pvgpu_map(struct pvgpu_file *file, struct vm_area_struct *vma)
{
	struct pvgpu_session *session = file->session;
	struct pvgpu *device = session->device;
	u64 length = vma->vm_end - vma->vm_start;
	struct pvgpu_mapping *mapping;
	int error;

	if (pvgpu_session_over(session))
		return -ENODEV;
	/* As the kernel's own drivers: memory of a GPU has no private copies. */
	if ((vma->vm_flags & (VM_SHARED | VM_MAYWRITE)) == VM_MAYWRITE)
		return -EINVAL;
	mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	if (!mapping)
		return -ENOMEM;
	error = pvgpu_map_on_host(file, vma, length, &mapping->aperture_offset);
	if (error)
		goto free;
	/* The Rust half has checked against the host's word, this is against the region itself. */
	error = -EPROTO;
	if (!PAGE_ALIGNED(mapping->aperture_offset) || mapping->aperture_offset > device->aperture.len ||
	    length > device->aperture.len - mapping->aperture_offset)
		goto unmap;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_set(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
#else
	vma->vm_flags |= VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP;
#endif
	kref_init(&mapping->references);
	mapping->session = pvgpu_session_get(session);
	mapping->length = length;
	mapping->start = vma->vm_pgoff;
	drm_dev_get(device->node);
	vma->vm_private_data = mapping;
	vma->vm_ops = &pvgpu_vma_operations;
	return 0;
unmap:
	pvgpu_rust_unmap(session, session->host, mapping->aperture_offset, length);
free:
	kfree(mapping);
	return error;
}
