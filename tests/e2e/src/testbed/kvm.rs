//! L1's KVM by itself: without it, nothing that follows says anything about pvgpu.
#![allow(unsafe_code)]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{Failure, Test};
use crate::ensure;

pub const TESTS: &[Test] = &[Test {
    name: "kvm_runs_a_guest_that_computes_a_sum",
    run: sum,
}];

/// Real mode: adds two registers, writes the sum to memory and to a port, halts.
fn sum() -> Result<(), Failure> {
    const CODE_AT: u64 = 0x1000;
    const SUM_AT: u64 = 0x2000;
    const CODE: &[u8] = &[
        0x00, 0xd8, // add al, bl
        0xa2, 0x00, 0x20, // mov [SUM_AT], al
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    memory.write_slice(CODE, GuestAddress(CODE_AT))?;

    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: 0x4000,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        flags: 0,
    };
    // SAFETY: `memory` is that long, and outlives the VM's last run below.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    (
        registers.rip,
        registers.rax,
        registers.rbx,
        registers.rflags,
    ) = (CODE_AT, 40, 2, 2);
    vcpu.set_regs(&registers)?;

    match vcpu.run()? {
        VcpuExit::IoOut(0x3f8, [42]) => {}
        other => return Err(format!("expected the sum on port 0x3f8, got {other:?}").into()),
    }
    match vcpu.run()? {
        VcpuExit::Hlt => {}
        other => return Err(format!("expected a halt, got {other:?}").into()),
    }
    let sum: u8 = memory.read_obj(GuestAddress(SUM_AT))?;
    ensure!(sum == 42, "the guest wrote {sum} to memory, not 42");
    Ok(())
}
