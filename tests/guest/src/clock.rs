//! Time since the processor started, from its time-stamp counter.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::ring0;

/// First hypervisor leaf of CPUID: eax is the last one.
const HYPERVISOR: u32 = 0x4000_0000;
/// Hypervisor leaf for timing: eax is the frequency of the time-stamp counter in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// Leaf of the time-stamp counter and the crystal: ebx/eax times ecx Hz.
const CRYSTAL: u32 = 0x15;

/// Nanoseconds per tick, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);

/// Finds out how fast the counter runs; kHz. Must be called before [`now_ns`] means anything.
pub fn start() -> Result<u64, &'static str> {
    let khz = frequency_khz()
        .filter(|khz| (100_000..100_000_000).contains(khz))
        .ok_or(
            "CPUID leaf 0x40000010 does not tell the TSC frequency: start the guest with mini-vmm",
        )?;
    SCALE.store((1_000_000u64 << 32) / khz, Ordering::Relaxed);
    Ok(khz)
}

fn frequency_khz() -> Option<u64> {
    if ring0::cpuid(HYPERVISOR, 0)[0] >= HYPERVISOR_TIMING {
        return Some(u64::from(ring0::cpuid(HYPERVISOR_TIMING, 0)[0]));
    }
    let [denominator, numerator, crystal_hz, _] = ring0::cpuid(CRYSTAL, 0);
    (u64::from(crystal_hz) * u64::from(numerator))
        .checked_div(u64::from(denominator))
        .map(|hz| hz / 1000)
}

/// Ticks of the time-stamp counter.
#[expect(unsafe_code, reason = "the rdtsc instruction")]
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear (entry.s).
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds since the counter was zero.
#[inline]
pub fn now_ns() -> u64 {
    ((u128::from(ticks()) * u128::from(SCALE.load(Ordering::Relaxed))) >> 32) as u64
}
