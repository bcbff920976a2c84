//! What tasks tell people and programs on standard output. Every task uses it instead of `println!`, which would panic when
//! the output cannot be written.

use std::io::{self, ErrorKind, Write};
use std::process;

/// The exit code of a task whose reader has gone (`| head`): what a shell shows for SIGPIPE.
const READER_GONE: i32 = 128 + 13;

/// Like `println!`, for [`write()`].
macro_rules! say {
    ($($argument:tt)*) => { crate::say::write(format_args!($($argument)*)) };
}
pub(crate) use say;

/// Writes a line. If that fails, it ends the task: nobody would see the rest. (QEMU and Xvfb die with this process.)
pub fn write(line: std::fmt::Arguments) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        if error.kind() == ErrorKind::BrokenPipe {
            process::exit(READER_GONE);
        }
        eprintln!(
            "cargo xtask: cannot write to standard output: {error}; send it to a file or a program that takes it"
        );
        process::exit(2);
    }
}
