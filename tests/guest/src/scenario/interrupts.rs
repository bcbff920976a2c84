//! `scenario=interrupts`: takes interrupts of the local APIC's timer while halted and while running, and of the serial port.

use alloc::format;
use alloc::string::String;
use core::sync::atomic::Ordering;

use crate::interrupts::Interrupt;
use crate::machine::Machine;
use crate::{clock, println, ring0};

/// Interrupt of the first serial port.
const SERIAL_GSI: u8 = 4;
/// Its interrupt enable register, and the bit for "transmitter empty".
const SERIAL_INTERRUPT_ENABLE: (u16, u8) = (0x3f9, 2);
/// Its interrupt identification register; reading it acknowledges "transmitter empty".
const SERIAL_INTERRUPT_IDENTIFICATION: u16 = 0x3fa;
/// Longest that an interrupt may take.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Timer interrupts of each kind.
const ROUNDS: u32 = 20;

/// Runs the scenario.
pub fn run(_machine: &Machine) -> Result<(), String> {
    let timer = Interrupt::TIMER;

    let before = timer.count();
    let start = clock::now_ns();
    for _ in 0..ROUNDS {
        timer.sleep(timer.count(), 1_000_000);
    }
    let elapsed = clock::now_ns() - start;
    let taken = timer.count() - before;
    println!("halted: {taken} timer interrupts in {} us", elapsed / 1000);
    if taken != ROUNDS {
        return Err(format!("{taken} timer interrupts instead of {ROUNDS}"));
    }
    if elapsed < u64::from(ROUNDS) * 1_000_000 {
        return Err(format!("{ROUNDS} sleeps of 1 ms took only {elapsed} ns"));
    }

    let serial = Interrupt::listen(SERIAL_GSI).ok_or("no interrupt line for the serial port")?;
    let before = serial.count();
    ring0::port_write(SERIAL_INTERRUPT_ENABLE.0, SERIAL_INTERRUPT_ENABLE.1);
    println!("a line that the serial port interrupts for");
    let deadline = clock::now_ns() + PATIENCE_NS;
    while serial.count() == before && clock::now_ns() < deadline {
        core::hint::spin_loop();
    }
    ring0::port_write(SERIAL_INTERRUPT_ENABLE.0, 0);
    ring0::port_read(SERIAL_INTERRUPT_IDENTIFICATION);
    let taken = serial.count() - before;
    println!("running: {taken} serial interrupts");
    if taken == 0 {
        return Err(String::from("the serial port raised no interrupt"));
    }

    let strays = ring0::interrupts()
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(vector, count)| {
            ![32 + usize::from(SERIAL_GSI), 62].contains(vector)
                && count.load(Ordering::Relaxed) > 0
        })
        .count();
    if strays > 0 {
        return Err(format!(
            "{strays} interrupt lines that nobody listens to were raised"
        ));
    }
    Ok(())
}
