//! What a panic does: a line for the log, then the kernel's `BUG()`, which ends the calling process.
#![allow(unsafe_code)]

use crate::kernel;
use core::fmt::{self, Write};

/// A line that is cut when it is too long.
struct Line {
    bytes: [u8; 192],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *to = from;
            self.length += 1;
        }
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let mut line = Line {
        bytes: [0; 192],
        length: 0,
    };
    // A line takes whatever fits.
    let _ = write!(line, "{info}");
    loop {
        // SAFETY: `length` bytes of the line were written. BUG() may be called anywhere.
        unsafe {
            kernel::pvgpu_print(line.bytes.as_ptr(), line.length);
            kernel::pvgpu_bug();
        }
    }
}
