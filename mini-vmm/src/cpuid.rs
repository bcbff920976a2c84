//! What the guest's CPUID instruction reports: KVM's own offer, lightly filtered.
//!
//! `vcpu` asks for one table per vCPU. The filter hides the extended processor state (XSAVE, AVX and
//! what depends on it), which not every KVM this monitor runs on can emulate and restore, and adds
//! what guests need to know about the machine: that there is a hypervisor, the topology, the clock.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::layout;

/// Leaf 1, ECX: hypervisor present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the local timer can be armed by a time-stamp deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: MONITOR, FMA, XSAVE, OSXSAVE, AVX, F16C.
const LEAF_1_ECX_HIDDEN: u32 = 1 << 3 | 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29;
/// Leaf 7, EBX: AVX2, ERMS, AVX512 (F, DQ, IFMA, PF, ER, CD, BW, VL).
const LEAF_7_EBX_HIDDEN: u32 =
    1 << 5 | 1 << 9 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
/// Leaf 7, ECX: AVX512 (VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ), PKU, OSPKE, VAES, VPCLMULQDQ.
const LEAF_7_ECX_HIDDEN: u32 =
    1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
/// Leaf 7, EDX: AVX512 4VNNIW and 4FMAPS, fast short REP MOVSB, AMX.
const LEAF_7_EDX_HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 22 | 1 << 24 | 1 << 25;

/// First leaf for hypervisors; its EAX is the last one.
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// Why no table could be made.
#[derive(Debug, thiserror::Error)]
#[error(
    "KVM reports more CPUID leaves than fit into one table: this is a defect of mini-vmm, report it"
)]
pub struct TooManyLeaves;

/// The machine facts that CPUID tells a guest.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// This vCPU's local APIC identifier.
    pub cpu: u8,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Frequency of the time-stamp counter in kHz; 0 where the host does not know it.
    pub tsc_khz: u32,
}

/// The table of one vCPU made from what KVM supports.
///
/// # Errors
///
/// [`TooManyLeaves`] when the added leaf does not fit.
pub fn table(supported: &CpuId, topology: Topology) -> Result<CpuId, TooManyLeaves> {
    let mut leaves: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    leaves.retain(|leaf| leaf.function != layout::CPUID_TIMING_LEAF);
    for leaf in &mut leaves {
        filter(leaf, topology);
    }
    if !leaves.iter().any(|leaf| leaf.function == HYPERVISOR_LEAF) {
        leaves.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_LEAF,
            eax: layout::CPUID_TIMING_LEAF,
            ..Default::default()
        });
    }
    leaves.push(kvm_cpuid_entry2 {
        function: layout::CPUID_TIMING_LEAF,
        eax: topology.tsc_khz,
        ..Default::default()
    });
    CpuId::from_entries(&leaves).map_err(|_| TooManyLeaves)
}

fn filter(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ecx = (leaf.ecx | HYPERVISOR | TSC_DEADLINE) & !LEAF_1_ECX_HIDDEN;
            // Bits 31-24: APIC identifier; 23-16: number of logical processors.
            leaf.ebx =
                leaf.ebx & 0xffff | u32::from(topology.cpu) << 24 | u32::from(topology.cpus) << 16;
        }
        (7, 0) => {
            leaf.ebx &= !LEAF_7_EBX_HIDDEN;
            leaf.ecx &= !LEAF_7_ECX_HIDDEN;
            leaf.edx &= !LEAF_7_EDX_HIDDEN;
        }
        // Further structured features: all of them are AVX extensions.
        (7, _) => leaf.eax = 0,
        // Extended topology: EDX is the x2APIC identifier.
        (0xb | 0x1f, _) => leaf.edx = u32::from(topology.cpu),
        // Extended processor state: none.
        (0xd, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        (HYPERVISOR_LEAF, _) => leaf.eax = leaf.eax.max(layout::CPUID_TIMING_LEAF),
        _ => {}
    }
}

/// How many bits a guest-physical address has (leaf 0x8000_0008; 36 where a processor does not say).
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008);
    leaf.map(|leaf| leaf.eax & 0xff)
        .filter(|bits| *bits != 0)
        .unwrap_or(36)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        }
    }

    fn find(table: &CpuId, function: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = table
            .as_slice()
            .iter()
            .filter(|l| l.function == function)
            .collect();
        assert_eq!(found.len(), 1, "{function:#x}");
        *found[0]
    }

    #[test]
    fn the_guest_sees_no_extended_state_but_a_hypervisor() {
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(7, 0), leaf(0xd, 0)]).unwrap();
        let table = table(
            &supported,
            Topology {
                cpu: 3,
                cpus: 4,
                tsc_khz: 1,
            },
        )
        .unwrap();
        let one = find(&table, 1);
        assert_eq!(one.ecx & (1 << 26 | 1 << 28), 0, "XSAVE, AVX");
        assert_ne!(one.ecx & 1 << 31, 0, "hypervisor");
        assert_eq!(one.ebx >> 16, 0x0304);
        assert_eq!(find(&table, 7).ebx & (1 << 5 | 1 << 16), 0, "AVX2, AVX512F");
        assert_eq!(find(&table, 0xd).eax, 0);
    }

    #[test]
    fn the_timing_leaf_is_announced_and_holds_the_clock() {
        let mut hypervisor = leaf(0x4000_0000, 0);
        hypervisor.eax = 0x4000_0001;
        let supported = CpuId::from_entries(&[hypervisor]).unwrap();
        for supported in [supported, CpuId::from_entries(&[leaf(0, 0)]).unwrap()] {
            let table = table(
                &supported,
                Topology {
                    cpu: 0,
                    cpus: 1,
                    tsc_khz: 2_800_000,
                },
            )
            .unwrap();
            assert_eq!(find(&table, 0x4000_0000).eax, 0x4000_0010);
            assert_eq!(find(&table, 0x4000_0010).eax, 2_800_000);
        }
    }
}
