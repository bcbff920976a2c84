//! The yardstick device: what any proxy could reach at best on this machine, measured by the same guest in the same run.
//!
//! It has two bells, a thread that answers them or polls a word of guest memory, and two things that the host does
//! without a guest: copying memory and issuing a native ioctl. The guest's side is
//! `tests/guest/src/scenario/bench.rs`, the registers are [`pvgpu_scenarios::bench`].

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

use pvgpu_host_proxy::sandbox::Allowed;
use pvgpu_mini_vmm::bus::{Attachment, Doorbell, MmioDevice};
use pvgpu_mini_vmm::layout;
use pvgpu_protocol::family::virtio_gpu;
use pvgpu_scenarios::bench::{ANSWER, COPY_SIZE, mode, register};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    VolatileMemory,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::drm_ioctl::Node;

/// Where the device is in guest-physical memory.
pub const ADDRESS: u64 = layout::EXTRA_MMIO;

/// What is put on the guest's command line.
pub fn announcement() -> String {
    format!("pvgpu.yardstick={ADDRESS:#x}")
}

/// Looks at the word or the bell between two looks at the mode.
const LOOKS: u32 = 256;

/// The device.
pub struct Yardstick {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    blocked: Arc<EventFd>,
    spinning: Arc<EventFd>,
    memory: OnceLock<GuestMemoryAtomic<GuestMemoryMmap>>,
    /// Guest-physical address of the two words.
    address: AtomicU32,
    /// What the thread is to wait for, and what it waits for.
    wanted: AtomicU32,
    current: AtomicU32,
    ending: AtomicBool,
    buffers: Mutex<(Vec<u8>, Vec<u8>)>,
    node: Option<Node>,
    nanoseconds: AtomicU64,
    thread: OnceLock<Thread>,
}

impl Yardstick {
    /// A device whose native ioctls go to `node`.
    pub fn new(node: Option<Node>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            blocked: Arc::new(EventFd::new(0)?),
            spinning: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            memory: OnceLock::new(),
            address: AtomicU32::new(0),
            wanted: AtomicU32::new(mode::IDLE),
            current: AtomicU32::new(mode::IDLE),
            ending: AtomicBool::new(false),
            buffers: Mutex::new((vec![1; COPY_SIZE], vec![2; COPY_SIZE])),
            node,
            nanoseconds: AtomicU64::new(u64::MAX),
            thread: OnceLock::new(),
        });
        let answering = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("yardstick".into())
            .spawn(move || answering.answer())?;
        let _ = shared.thread.set(thread.thread().clone());
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Tells it where the guest's memory is; the guest must not have started. It holds on to that memory until it is
    /// dropped, so the machine's bus should be the last to hold the device.
    pub fn set_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) {
        let _ = self.shared.memory.set(memory);
    }

    /// What goes onto the machine's bus.
    pub fn attachment(self: &Arc<Self>) -> Attachment {
        let doorbell = |offset, event: &Arc<EventFd>| Doorbell {
            offset,
            value: None,
            event: Arc::clone(event),
        };
        Attachment {
            base: ADDRESS,
            size: 0x1000,
            device: Arc::clone(self) as _,
            doorbells: vec![
                doorbell(register::BELL_BLOCKED, &self.shared.blocked),
                doorbell(register::BELL_SPINNING, &self.shared.spinning),
            ],
            interrupts: Vec::new(),
        }
    }
}

impl Drop for Yardstick {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("bench: the yardstick's thread has panicked");
        }
    }
}

impl Shared {
    fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = self.blocked.write(1);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// The thread.
    fn answer(&self) {
        while !self.ending.load(Ordering::SeqCst) {
            let mode = self.wanted.load(Ordering::SeqCst);
            if mode == mode::IDLE {
                self.current.store(mode, Ordering::SeqCst);
                thread::park();
            } else if self.answer_in(mode).is_none() {
                eprintln!("bench: the guest gave the yardstick no memory");
                self.ending.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Answers until the mode changes; `None` when there is no memory at the address.
    fn answer_in(&self, mode: u32) -> Option<()> {
        let memory = self.memory.get()?.memory();
        let address = GuestAddress(self.address.load(Ordering::SeqCst).into());
        let words = memory.get_slice(address, 2 * ANSWER).ok()?;
        let question = words.get_atomic_ref::<AtomicU32>(0).ok()?;
        let answer = words.get_atomic_ref::<AtomicU32>(ANSWER).ok()?;
        self.current.store(mode, Ordering::SeqCst);
        let mut last = answer.load(Ordering::Relaxed);
        while self.wanted.load(Ordering::Relaxed) == mode && !self.ending.load(Ordering::Relaxed) {
            match mode {
                mode::BLOCKED => {
                    let _ = self.blocked.read();
                    answer.store(question.load(Ordering::Acquire), Ordering::Release);
                }
                mode::SPINNING => {
                    if (0..LOOKS).any(|_| self.spinning.read().is_ok()) {
                        answer.store(question.load(Ordering::Acquire), Ordering::Release);
                    }
                }
                _ => {
                    for _ in 0..LOOKS {
                        let now = question.load(Ordering::Acquire);
                        if now != last {
                            answer.store(now, Ordering::Release);
                            last = now;
                        }
                        std::hint::spin_loop();
                    }
                }
            }
        }
        Some(())
    }

    fn set_mode(&self, mode: u32) {
        self.wanted.store(mode, Ordering::SeqCst);
        self.wake();
        while self.current.load(Ordering::SeqCst) != mode && !self.ending.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }

    fn copy(&self, times: u32) -> u64 {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let (from, to) = &mut *buffers;
        let start = Instant::now();
        for _ in 0..times {
            to.copy_from_slice(std::hint::black_box(from));
            std::hint::black_box(&mut *to);
        }
        nanoseconds(start)
    }

    fn getparam(&self, times: u32) -> Option<u64> {
        /// `VIRTGPU_PARAM_3D_FEATURES` of virtgpu_drm.h.
        const FEATURES_3D: u64 = 1;
        let node = self.node.as_ref()?;
        let start = Instant::now();
        for _ in 0..times {
            node.virtgpu_parameter(FEATURES_3D).ok()?;
        }
        Some(nanoseconds(start))
    }
}

fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl MmioDevice for Yardstick {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let nanoseconds = self.shared.nanoseconds.load(Ordering::Relaxed);
        let value = match offset {
            register::NANOSECONDS_LOW => nanoseconds,
            register::NANOSECONDS_HIGH => nanoseconds >> 32,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let shared = &self.shared;
        match offset {
            register::ADDRESS => shared.address.store(value, Ordering::SeqCst),
            register::MODE => shared.set_mode(value),
            register::COPY => {
                let nanoseconds = shared.copy(value);
                shared.nanoseconds.store(nanoseconds, Ordering::Relaxed);
            }
            register::GETPARAM => {
                let nanoseconds = shared.getparam(value).unwrap_or(u64::MAX);
                shared.nanoseconds.store(nanoseconds, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn system_calls(&self) -> &[Allowed] {
        static NATIVE: [Allowed; 1] = [Allowed::ioctl(virtio_gpu::GETPARAM, "the native GETPARAM")];
        &NATIVE
    }
}
