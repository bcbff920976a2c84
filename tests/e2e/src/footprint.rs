//! What a process has of the kernel, and whether it has more than before: for tests and `cargo xtask soak`, which look for
//! leaks. It only reads `/proc`.

use crate::live_heap;
use serde::Serialize;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What a process has at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Open file descriptors.
    pub descriptors: u64,
    /// Mappings: lines of `/proc/PID/maps`.
    pub mappings: u64,
    /// Threads.
    pub threads: u64,
    /// KiB of memory that is there (`VmRSS`).
    pub resident: u64,
    /// KiB of private writable mappings (`VmData`).
    pub data: u64,
}

/// How much more than the base line is no leak.
///
/// Descriptors and threads come back exactly. The C library keeps some of what it has got: stacks of ended threads (up to 40 MiB
/// of 2 MiB and two mappings each), arenas of its heap for threads that there were at the same time (at most 8 per processor, two
/// mappings each), and in those what is less than a free page. A leak grows with the number of sessions, these do not.
pub const TOLERANCE: Footprint = Footprint {
    descriptors: 0,
    mappings: 64,
    threads: 0,
    resident: 12 << 10,
    data: 56 << 10,
};

impl Footprint {
    /// Of this process.
    pub fn own() -> io::Result<Self> {
        Self::of("self")
    }

    /// Of the process with this number.
    pub fn of(process: &str) -> io::Result<Self> {
        let folder = PathBuf::from("/proc").join(process);
        let status = fs::read_to_string(folder.join("status"))?;
        let field = |name: &str| -> io::Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.ok_or_else(|| io::Error::other(format!("/proc/{process}/status has no {name}")))
        };
        let mappings = fs::read_to_string(folder.join("maps"))?.lines().count() as u64;
        // One of them is the folder itself, if it is one's own.
        let descriptors = fs::read_dir(folder.join("fd"))?.count() as u64;
        Ok(Self {
            descriptors,
            mappings,
            threads: field("Threads:")?,
            resident: field("VmRSS:")?,
            data: field("VmData:")?,
        })
    }

    /// What there is more of than in `base`, in words; `None` when all is within [`TOLERANCE`].
    pub fn leak_since(&self, base: &Self) -> Option<String> {
        let compare = |name: &str, unit: &str, now: u64, base: u64, tolerance: u64| {
            (now > base + tolerance).then(|| format!("{name} from {base}{unit} to {now}{unit}"))
        };
        let (base, by) = (base, &TOLERANCE);
        let leaks: Vec<String> = [
            compare(
                "descriptors",
                "",
                self.descriptors,
                base.descriptors,
                by.descriptors,
            ),
            compare("mappings", "", self.mappings, base.mappings, by.mappings),
            compare("threads", "", self.threads, base.threads, by.threads),
            compare(
                "resident memory",
                " KiB",
                self.resident,
                base.resident,
                by.resident,
            ),
            compare("private memory", " KiB", self.data, base.data, by.data),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!leaks.is_empty()).then(|| leaks.join(", "))
    }

    /// Of this process without load.
    pub fn at_rest() -> io::Result<Self> {
        live_heap::trim();
        Self::own()
    }

    /// Waits until this process has no more than `base`, since threads and engines take a moment to end; then `Ok` is what it
    /// has, otherwise `Err` is the leak.
    pub fn settle(base: &Self, patience: Duration) -> Result<Self, String> {
        let deadline = Instant::now() + patience;
        loop {
            let now = Self::at_rest().map_err(|error| error.to_string())?;
            match now.leak_since(base) {
                None => return Ok(now),
                Some(leak) if Instant::now() >= deadline => return Err(leak),
                Some(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} fds, {} mappings, {} threads, {:.1} MiB resident, {:.1} MiB private",
            self.descriptors,
            self.mappings,
            self.threads,
            self.resident as f64 / 1024.0,
            self.data as f64 / 1024.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_descriptor_or_thread_too_many_is_a_leak_and_less_is_none() {
        let base = Footprint {
            descriptors: 8,
            mappings: 50,
            threads: 3,
            resident: 9000,
            data: 2000,
        };
        assert_eq!(base.leak_since(&base), None);
        assert_eq!(Footprint::default().leak_since(&base), None);
        let more = Footprint {
            descriptors: 9,
            threads: 4,
            ..base
        };
        let leak = more.leak_since(&base).unwrap();
        assert_eq!(leak, "descriptors from 8 to 9, threads from 3 to 4");
        let more = Footprint {
            mappings: 50 + TOLERANCE.mappings + 1,
            ..base
        };
        assert_eq!(more.leak_since(&base).unwrap(), "mappings from 50 to 115");
    }

    #[test]
    fn an_open_file_and_a_thread_are_counted() {
        let before = Footprint::own().unwrap();
        let files: Vec<_> = (0..100).map(|_| fs::File::open("/proc").unwrap()).collect();
        let after = Footprint::own().unwrap();
        assert!(after.descriptors >= before.descriptors + 50, "{after}");
        drop(files);
        assert!(after.threads >= 1 && after.mappings > 10 && after.resident > 100);
    }
}
