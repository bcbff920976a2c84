//! Interrupts: local APIC and I/O APIC, and waiting for them.
//!
//! The handler (`ring0/traps.s`) counts each interrupt by vector and acknowledges it; whoever waits for one compares counters.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{clock, ring0};

/// Vector of global system interrupt 0.
const GSI_VECTOR: u8 = 32;
/// Vector of the local APIC's timer.
const TIMER_VECTOR: u8 = 62;
/// Vector of the local APIC's spurious interrupts.
const SPURIOUS_VECTOR: u8 = 63;
/// Pins of the I/O APIC of a PC.
const IO_APIC_PINS: u8 = 24;

/// Registers of the local APIC (Intel SDM volume 3, table 11-1).
mod local_apic {
    pub const ID: u32 = 0xfee0_0020;
    pub const SPURIOUS: u32 = 0xfee0_00f0;
    pub const TIMER: u32 = 0xfee0_0320;
    pub const TIMER_INITIAL_COUNT: u32 = 0xfee0_0380;
    pub const TIMER_DIVIDE: u32 = 0xfee0_03e0;
    /// In SPURIOUS: the APIC is on.
    pub const ENABLE: u32 = 0x100;
    /// In TIMER: no interrupt.
    pub const MASKED: u32 = 0x1_0000;
    /// In TIMER_DIVIDE: count every tick of the bus clock, 1 GHz under KVM.
    pub const DIVIDE_BY_1: u32 = 0xb;
}

/// Registers of the I/O APIC (82093AA data sheet).
mod io_apic {
    pub const SELECT: u32 = 0xfec0_0000;
    pub const WINDOW: u32 = 0xfec0_0010;
    /// First half of pin 0's redirection entry; each pin has two.
    pub const REDIRECTION: u32 = 0x10;
}

/// An interrupt line that the guest listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupt {
    vector: u8,
}

/// Switches the local APIC on, with its timer quiet.
pub fn start() {
    ring0::interrupt_controller_write(
        local_apic::SPURIOUS,
        local_apic::ENABLE | u32::from(SPURIOUS_VECTOR),
    );
    ring0::interrupt_controller_write(
        local_apic::TIMER,
        local_apic::MASKED | u32::from(TIMER_VECTOR),
    );
    ring0::interrupt_controller_write(local_apic::TIMER_DIVIDE, local_apic::DIVIDE_BY_1);
}

/// Interrupts taken so far on all lines.
pub fn count() -> u32 {
    ring0::interrupts()[0].load(Ordering::Acquire)
}

/// Halts until an interrupt of any line arrives, unless [`count`] is no longer `seen`.
fn sleep(seen: u32) {
    ring0::sleep_while(&ring0::interrupts()[0], seen);
}

/// Has the local APIC's timer interrupt once, after that time.
fn set_timer(nanoseconds: u64) {
    let ticks = u32::try_from(nanoseconds).unwrap_or(u32::MAX).max(1);
    ring0::interrupt_controller_write(local_apic::TIMER, u32::from(TIMER_VECTOR));
    ring0::interrupt_controller_write(local_apic::TIMER_INITIAL_COUNT, ticks);
}

impl Interrupt {
    /// The interrupt of the local APIC's timer.
    pub const TIMER: Self = Self {
        vector: TIMER_VECTOR,
    };

    /// Starts to listen to a global system interrupt, edge triggered. Nothing when the machine has no such line.
    pub fn listen(gsi: u8) -> Option<Self> {
        let interrupt = Self::of_gsi(gsi)?;
        let destination = ring0::interrupt_controller_read(local_apic::ID) & 0xff00_0000;
        let entry = io_apic::REDIRECTION + 2 * u32::from(gsi);
        for (register, value) in [
            (entry + 1, destination),
            (entry, u32::from(interrupt.vector)),
        ] {
            ring0::interrupt_controller_write(io_apic::SELECT, register);
            ring0::interrupt_controller_write(io_apic::WINDOW, value);
        }
        Some(interrupt)
    }

    /// The interrupt that [`Interrupt::listen`] gave for this line.
    pub fn of_gsi(gsi: u8) -> Option<Self> {
        (gsi < IO_APIC_PINS).then(|| Self {
            vector: GSI_VECTOR + gsi,
        })
    }

    /// Halts until [`Interrupt::count`] is no longer `seen`, or not much longer than `nanoseconds` (at most 4.29 s); the timer of
    /// an earlier call may end it sooner.
    pub fn sleep(self, seen: u32, nanoseconds: u64) {
        /// When the timer was last set to interrupt, and how often it had done so before.
        static ALARM: (AtomicU64, AtomicU32) = (AtomicU64::new(0), AtomicU32::new(u32::MAX));
        // The timer's count is read before anything else: if it interrupts from here on, that ends the sleep.
        let rung = Self::TIMER.count();
        let now = clock::now_ns();
        let pending = ALARM.1.load(Ordering::Relaxed) == rung
            && (now..=now + nanoseconds).contains(&ALARM.0.load(Ordering::Relaxed));
        // To set the timer costs more than to sleep, so one that will interrupt early enough is left alone.
        if !pending {
            set_timer(nanoseconds);
            ALARM.0.store(now + nanoseconds, Ordering::Relaxed);
            ALARM.1.store(rung, Ordering::Relaxed);
        }
        loop {
            let interrupts = count();
            if self.count() != seen || Self::TIMER.count() != rung {
                return;
            }
            sleep(interrupts);
        }
    }

    /// How often it has been taken.
    pub fn count(self) -> u32 {
        ring0::interrupts()[usize::from(self.vector)].load(Ordering::Acquire)
    }
}
