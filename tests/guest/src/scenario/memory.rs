//! `scenario=memory`: checks the guest's own memcpy, memmove, memset and memcmp against plain loops, and the heap.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::hint::black_box;

use crate::machine::Machine;
use crate::println;

/// Lengths from nothing to several rounds of the 64-byte loops.
const LENGTHS: core::ops::Range<usize> = 0..280;
/// Distances between source and destination for overlapping copies, in both directions.
const DISTANCES: [usize; 9] = [0, 1, 7, 15, 16, 17, 63, 64, 100];
/// Room for the longest length at the largest distance, and a margin that must not change.
const ROOM: usize = 512;

/// Runs the scenario.
pub fn run(_machine: &Machine) -> Result<(), String> {
    let pattern: Vec<u8> = (0..ROOM)
        .map(|index| (index * 7 + index / 251 + 1) as u8)
        .collect();
    for length in LENGTHS {
        for distance in DISTANCES {
            check_copy(&pattern, 16, 16 + distance, length)?;
            check_copy(&pattern, 16 + distance, 16, length)?;
        }
        check_fill(&pattern, length)?;
        check_compare(&pattern[3..3 + length])?;
    }
    println!(
        "copying, filling and comparing agree with plain loops for 0 to {} bytes",
        LENGTHS.end - 1
    );

    let mut blocks: Vec<Vec<u8>> = (1..200usize)
        .map(|size| vec![size as u8; size * 97])
        .collect();
    blocks.retain(|block| block[0] % 3 != 0);
    blocks.extend((1..100usize).map(|size| vec![size as u8; size * 1024]));
    if let Some(block) = blocks
        .iter()
        .find(|block| block.iter().any(|byte| *byte != block[0]))
    {
        return Err(format!("a block of {} bytes was overwritten", block.len()));
    }
    println!(
        "{} blocks on the heap kept what was written to them",
        blocks.len()
    );
    Ok(())
}

/// `copy_within` is memmove.
fn check_copy(pattern: &[u8], from: usize, to: usize, length: usize) -> Result<(), String> {
    let mut copied = pattern.to_vec();
    black_box(&mut copied[..]).copy_within(from..from + length, to);
    for (index, byte) in copied.iter().enumerate() {
        let expected = if (to..to + length).contains(&index) {
            pattern[index - to + from]
        } else {
            pattern[index]
        };
        if *byte != expected {
            return Err(format!(
                "moving {length} bytes from {from} to {to}: byte {index} is {byte}, not {expected}"
            ));
        }
    }
    Ok(())
}

/// `fill` with bytes is memset.
fn check_fill(pattern: &[u8], length: usize) -> Result<(), String> {
    let mut filled = pattern.to_vec();
    black_box(&mut filled[5..5 + length]).fill(black_box(0xa5));
    for (index, byte) in filled.iter().enumerate() {
        let expected = if (5..5 + length).contains(&index) {
            0xa5
        } else {
            pattern[index]
        };
        if *byte != expected {
            return Err(format!(
                "filling {length} bytes: byte {index} is {byte}, not {expected}"
            ));
        }
    }
    Ok(())
}

/// `cmp` of byte slices is memcmp.
fn check_compare(bytes: &[u8]) -> Result<(), String> {
    let mut other = bytes.to_vec();
    if black_box(&other[..]).cmp(bytes) != Ordering::Equal {
        return Err(format!("{} equal bytes compare as different", bytes.len()));
    }
    for index in 0..bytes.len() {
        other[index] ^= 0x80;
        let expected = other[index].cmp(&bytes[index]);
        if black_box(&other[..]).cmp(bytes) != expected {
            return Err(format!(
                "{} bytes that differ at {index} do not compare as {expected:?}",
                bytes.len()
            ));
        }
        other[index] ^= 0x80;
    }
    Ok(())
}
