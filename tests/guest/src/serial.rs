//! The serial console: [`print!`] and [`println!`], each byte of which is an exit to the VMM.
//!
//! One `println!` is one service call for each 256 bytes, so that lines of several writers do not interleave.

use core::fmt::{self, Write};

use crate::ring0;

/// Collects what one `print!` writes.
struct Line {
    bytes: [u8; 256],
    used: usize,
}

impl Line {
    fn flush(&mut self) {
        ring0::serial_write(&self.bytes[..self.used]);
        self.used = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.used == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.used] = byte;
            self.used += 1;
        }
        Ok(())
    }
}

/// What `print!` and `println!` expand to.
pub fn write(arguments: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; 256],
        used: 0,
    };
    // Writing to a `Line` cannot fail; an error would come from a Display of the caller's, and its text ends there.
    let _ = line.write_fmt(arguments);
    line.flush();
}

/// Writes to the serial console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => { $crate::serial::write(format_args!($($argument)*)) };
}

/// Writes a line to the serial console.
#[macro_export]
macro_rules! println {
    () => { $crate::serial::write(format_args!("\n")) };
    ($($argument:tt)*) => { $crate::serial::write(format_args!("{}\n", format_args!($($argument)*))) };
}
