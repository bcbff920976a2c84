//! What the benchmark's guest (`tests/guest/src/scenario/bench.rs`) and its host (`tests/e2e/src/bench`) agree on: the
//! registers of the host's yardstick device, which measures what any proxy could reach at best. The host announces it
//! on the guest's command line as `pvgpu.yardstick=ADDRESS`. Nothing here measures.

/// Registers of the yardstick device, 32 bits each.
pub mod register {
    /// Write: an ioeventfd on which a thread of the host is blocked ([`super::mode::BLOCKED`]).
    pub const BELL_BLOCKED: u64 = 0x00;
    /// Write: an ioeventfd that a thread of the host reads again and again ([`super::mode::SPINNING`]).
    pub const BELL_SPINNING: u64 = 0x04;
    /// Write: guest-physical address, below 4 GiB, of two words on cache lines of their own ([`super::ANSWER`]). The thread
    /// copies the first to the second whenever it is told to.
    pub const ADDRESS: u64 = 0x08;
    /// Write: what the thread waits for, of [`super::mode`]. It does so when the write returns.
    pub const MODE: u64 = 0x0c;
    /// Write: copies [`super::COPY_SIZE`] bytes between two buffers of the host that many times, on the vCPU's thread.
    pub const COPY: u64 = 0x10;
    /// Write: issues GETPARAM on the host's DRM node that many times, on the vCPU's thread.
    pub const GETPARAM: u64 = 0x14;
    /// Read: nanoseconds that the last [`COPY`] or [`GETPARAM`] took, the lower half.
    pub const NANOSECONDS_LOW: u64 = 0x18;
    /// Read: the upper half; all ones when it failed.
    pub const NANOSECONDS_HIGH: u64 = 0x1c;
}

/// What the thread of the yardstick device waits for.
pub mod mode {
    /// To be told what to do; it uses no processor.
    pub const IDLE: u32 = 0;
    /// The bell, in a blocking read.
    pub const BLOCKED: u32 = 1;
    /// The bell, reading without blocking all the time.
    pub const SPINNING: u32 = 2;
    /// A change of the first word, reading it all the time: no bell.
    pub const POLLING: u32 = 3;
}

/// Where the second word lies behind the first, in bytes.
pub const ANSWER: usize = 64;

/// Size of the buffers of the bandwidth measurements in bytes: a picture of 1024 by 1024 pixels.
pub const COPY_SIZE: usize = 4 << 20;
