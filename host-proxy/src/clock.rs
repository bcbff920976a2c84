//! Clocks of the host's kernel: the monotonic one, for deadlines that a real ioctl compares with it, and the one that
//! counts a thread's processor time.

#![allow(unsafe_code)]

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    nanoseconds(libc::CLOCK_MONOTONIC)
}

/// Processor time of the calling thread in nanoseconds.
pub(crate) fn thread_ns() -> u64 {
    nanoseconds(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec that this call may write. It can't fail: these clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000) + nanoseconds
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_clock_counts_the_nanoseconds_of_the_clock_that_threads_sleep_by() {
        let (before, start) = (monotonic_ns(), Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        let (after, most) = (monotonic_ns(), start.elapsed() + Duration::from_secs(1));
        let counted = Duration::from_nanos(after - before);
        assert!(
            counted >= Duration::from_millis(2) && counted < most,
            "{counted:?}"
        );
    }
}
