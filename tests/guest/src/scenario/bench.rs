//! `scenario=bench measure=NAME,NAME,..`: measures round trips and copies with this guest's clock, and prints one line for
//! each: `bench NAME operations=N doorbells=D ns=A,B,C,..`, where every number behind `ns=` is a batch of N operations, and D
//! the doorbells of all batches. `rounds=` says how many batches.
//!
//! The batches of all measurements take turns, so that a floor and what is compared with it meet the same disturbances.
//! What the numbers mean, and what they are compared with, is `tests/e2e/src/bench`.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicU32, Ordering};

use pvgpu_guest_driver::channel::Channel;
use pvgpu_guest_driver::session::Pending;
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::{soft, virtio_gpu};
use pvgpu_scenarios::bench::{ANSWER, COPY_SIZE, mode, register};
use pvgpu_scenarios::{DeviceFile, Mapping};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::debug_device::DebugDevice;
use crate::device_file::{GuestFile, GuestMapping, SharedSession};
use crate::machine::Machine;
use crate::physical::Registers;
use crate::{clock, gpu, println};

/// Batches of each measurement unless `rounds=` says otherwise.
const ROUNDS: u64 = 15;
/// A batch takes at least this long, so that reading the clock does not count; and not much longer, so that some batches
/// escape whatever else runs on the machine.
const BATCH_NS: u64 = 400_000;
/// How often a batch is tried to find out how long it takes undisturbed.
const TRIES: u32 = 3;
/// Most operations of a batch.
const OPERATIONS_MAX: u32 = 1 << 16;
/// Between two operations of a host that is to be asleep; not counted.
const FALL_ASLEEP_NS: u64 = 100_000;
/// Most operations of a batch in which the host falls asleep in between.
const ASLEEP_OPERATIONS_MAX: u32 = 32;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `mmio_exit`: a write to a register that does nothing.
    MmioExit,
    /// `ioeventfd_blocked`, `ioeventfd_spinning`, `polled_line`: a thread of the host answers in that [`mode`].
    Echo(u32),
    /// `nop`: a request that does nothing.
    Nop,
    /// `nop_asleep`: the same, after a pause in which the host's thread falls asleep.
    NopAsleep,
    /// `getparam`: asks the host driver for a parameter.
    GetParam,
    /// `host_getparam`: the host does the same without a guest.
    HostGetParam,
    /// `pipeline_N`: N requests that do nothing, all submitted before the first is waited for.
    Pipeline(usize),
    /// `payload_N`: an ioctl with N bytes behind a pointer, which the driver refuses as soon as it has them.
    Payload(usize),
    /// `memcpy_N`: copies N bytes in the guest.
    Memcpy(usize),
    /// `aperture_read`: copies a whole buffer object out of the aperture.
    ApertureRead,
    /// `aperture_write`: copies into it.
    ApertureWrite,
    /// `host_copy`: the host copies as many bytes between two buffers of its own.
    HostCopy,
}

impl Kind {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "mmio_exit" => Self::MmioExit,
            "ioeventfd_blocked" => Self::Echo(mode::BLOCKED),
            "ioeventfd_spinning" => Self::Echo(mode::SPINNING),
            "polled_line" => Self::Echo(mode::POLLING),
            "nop" => Self::Nop,
            "nop_asleep" => Self::NopAsleep,
            "getparam" => Self::GetParam,
            "host_getparam" => Self::HostGetParam,
            "aperture_read" => Self::ApertureRead,
            "aperture_write" => Self::ApertureWrite,
            "host_copy" => Self::HostCopy,
            _ => {
                let (name, number) = name.rsplit_once('_')?;
                let number = number.parse().ok()?;
                match name {
                    "pipeline" => Self::Pipeline(number),
                    "payload" => Self::Payload(number),
                    "memcpy" => Self::Memcpy(number),
                    _ => return None,
                }
            }
        })
    }

    fn needs_gpu(self) -> bool {
        matches!(
            self,
            Self::Nop
                | Self::NopAsleep
                | Self::GetParam
                | Self::Pipeline(_)
                | Self::Payload(_)
                | Self::ApertureRead
                | Self::ApertureWrite
        )
    }

    fn operations_max(self) -> u32 {
        match self {
            Self::NopAsleep | Self::Echo(mode::BLOCKED) => ASLEEP_OPERATIONS_MAX,
            _ => OPERATIONS_MAX,
        }
    }
}

/// One measurement and what came of it.
struct Measurement {
    name: &'static str,
    kind: Kind,
    /// Operations of a batch.
    operations: u32,
    doorbells: u64,
    nanoseconds: Vec<u64>,
}

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let names = machine.command_line.get("measure");
    let names = names.ok_or("measure=NAME,NAME,.. does not say what to measure")?;
    let mut measurements = names
        .split(',')
        .map(|name| {
            let kind = Kind::parse(name).ok_or_else(|| format!("measure={name} is not known"))?;
            Ok(Measurement {
                name,
                kind,
                operations: 1,
                doorbells: 0,
                nanoseconds: Vec::new(),
            })
        })
        .collect::<Result<Vec<_>, String>>()?;
    let kinds: Vec<Kind> = measurements.iter().map(|one| one.kind).collect();
    let mut bench = Bench::new(machine, &kinds)?;
    for measurement in &mut measurements {
        let failed = |cause: String| format!("{}: {cause}", measurement.name);
        measurement.operations = bench.calibrate(measurement.kind).map_err(failed)?;
    }
    for _ in 0..machine.command_line.number("rounds").unwrap_or(ROUNDS) {
        for measurement in &mut measurements {
            let (nanoseconds, doorbells) = bench
                .batch(measurement.kind, measurement.operations)
                .map_err(|cause| format!("{}: {cause}", measurement.name))?;
            measurement.nanoseconds.push(nanoseconds);
            measurement.doorbells += doorbells;
        }
    }
    for measurement in &measurements {
        let batches: Vec<String> = measurement
            .nanoseconds
            .iter()
            .map(ToString::to_string)
            .collect();
        println!(
            "bench {} operations={} doorbells={} ns={}",
            measurement.name,
            measurement.operations,
            measurement.doorbells,
            batches.join(",")
        );
    }
    Ok(())
}

/// Two words on cache lines of their own, which a thread of the host reads and writes.
#[repr(C, align(4096))]
struct Words {
    question: AtomicU32,
    rest: [AtomicU32; ANSWER / 4],
}

impl Words {
    fn answer(&self) -> &AtomicU32 {
        &self.rest[ANSWER / 4 - 1]
    }
}

/// The host's yardstick device.
struct Yardstick {
    registers: Registers,
    words: Box<Words>,
}

/// Memory that starts at a page, as that of a buffer object does.
#[repr(C, align(4096))]
#[derive(Clone, FromBytes, Immutable, IntoBytes)]
struct Page([u8; 4096]);

/// Everything that measurements use.
struct Bench {
    debug: Option<DebugDevice>,
    yardstick: Option<Yardstick>,
    session: Option<SharedSession>,
    file: Option<GuestFile>,
    /// Name of the host driver.
    driver: String,
    buffer_object: Option<GuestMapping>,
    source: Vec<Page>,
    target: Vec<Page>,
    pending: Vec<Pending>,
    /// How long to wait before a measurement without the GPU, so that the GPU's thread on the host is asleep.
    settle_ns: u64,
}

impl Bench {
    fn new(machine: &Machine, kinds: &[Kind]) -> Result<Self, String> {
        let command_line = machine.command_line;
        let yardstick = match command_line.number("pvgpu.yardstick") {
            Some(address) => Some(Yardstick::at(address)?),
            None => None,
        };
        let pages = COPY_SIZE / size_of::<Page>();
        let mut bench = Self {
            debug: machine.debug,
            yardstick,
            session: None,
            file: None,
            driver: String::new(),
            buffer_object: None,
            source: vec![Page([0; 4096]); pages],
            target: vec![Page([0; 4096]); pages],
            pending: Vec::new(),
            settle_ns: command_line.number("settle_us").unwrap_or(0) * 1000,
        };
        if kinds.iter().any(|kind| kind.needs_gpu()) {
            let (session, aperture) = gpu::connect(machine)?;
            bench.driver = session.host().driver.as_str().to_string();
            let session = Rc::new(RefCell::new(session));
            let file = GuestFile::open(&session, aperture).map_err(because("open"))?;
            bench.session = Some(session);
            bench.file = Some(file);
        }
        if kinds.contains(&Kind::ApertureRead) || kinds.contains(&Kind::ApertureWrite) {
            bench.buffer_object = Some(bench.map_buffer_object()?);
        }
        Ok(bench)
    }

    /// Operations that take long enough for a batch. Finding out also warms everything up.
    fn calibrate(&mut self, kind: Kind) -> Result<u32, String> {
        let mut operations = 1;
        loop {
            let mut best = u64::MAX;
            for _ in 0..TRIES {
                best = best.min(self.batch(kind, operations)?.0);
                if best < BATCH_NS {
                    break;
                }
            }
            if best >= BATCH_NS || operations >= kind.operations_max() {
                return Ok(operations);
            }
            operations *= 2;
        }
    }

    /// One batch: nanoseconds that the operations took, and the doorbells that they rang.
    fn batch(&mut self, kind: Kind, operations: u32) -> Result<(u64, u64), String> {
        if !kind.needs_gpu() {
            wait(self.settle_ns);
        }
        if let Kind::Echo(mode) = kind {
            self.yardstick()?.registers.write(register::MODE, mode);
        }
        self.perform(kind, operations / 8 + 1)?;
        let before = self.doorbells();
        let nanoseconds = self.perform(kind, operations)?;
        let doorbells = self.doorbells() - before;
        if let Kind::Echo(_) = kind {
            self.yardstick()?
                .registers
                .write(register::MODE, mode::IDLE);
        }
        Ok((nanoseconds, doorbells))
    }

    fn doorbells(&self) -> u64 {
        let session = self.session.as_ref();
        session.map_or(0, |session| session.borrow_mut().channel().doorbells())
    }

    /// Performs the operations and returns how long they took in nanoseconds.
    fn perform(&mut self, kind: Kind, operations: u32) -> Result<u64, String> {
        match kind {
            Kind::MmioExit => {
                let debug = self.debug.ok_or("no debug device: boot with mini-vmm")?;
                timed(operations, || {
                    debug.do_nothing();
                    Ok(())
                })
            }
            Kind::Echo(mode) => {
                let yardstick = self.yardstick()?;
                let mut number = yardstick.words.answer().load(Ordering::Relaxed);
                match mode {
                    mode::BLOCKED => timed_apart(operations, || {
                        yardstick.ask(&mut number, Some(register::BELL_BLOCKED))
                    }),
                    mode::SPINNING => timed(operations, || {
                        yardstick.ask(&mut number, Some(register::BELL_SPINNING))
                    }),
                    _ => timed(operations, || yardstick.ask(&mut number, None)),
                }
            }
            Kind::Nop => {
                let mut session = self.session()?.borrow_mut();
                timed(operations, || session.nop().map_err(because("nop")))
            }
            Kind::NopAsleep => {
                let mut session = self.session()?.borrow_mut();
                timed_apart(operations, || session.nop().map_err(because("nop")))
            }
            Kind::Pipeline(depth) => {
                let (pending, session) = (&mut self.pending, self.session.as_ref());
                let mut session = session.ok_or(NO_GPU)?.borrow_mut();
                timed(operations, || {
                    let mut round = || -> Result<(), Errno> {
                        for _ in 0..depth {
                            pending.push(session.start_nop()?);
                        }
                        session.channel().doorbell();
                        for request in pending.drain(..) {
                            session.wait(&request)?;
                            session.finish(request)?;
                        }
                        Ok(())
                    };
                    round().map_err(because("nop"))
                })
            }
            Kind::GetParam => {
                let file = self.file.as_mut().ok_or(NO_GPU)?;
                match self.driver.as_str() {
                    "soft" => timed(operations, || {
                        let mut argument = soft::GetParam {
                            param: soft::param::COMMAND_SET,
                            value: 0,
                        };
                        file.ioctl(soft::DRM_IOCTL_SOFT_GETPARAM, &mut argument)
                            .map_err(because("GETPARAM"))?;
                        expect(argument.value == soft::COMMAND_SET, "GETPARAM is wrong")
                    }),
                    "virtio_gpu" => timed(operations, || {
                        let mut value = 0u32;
                        let mut argument = virtio_gpu::GetParam {
                            param: virtio_gpu::param::FEATURES_3D,
                            value: (&raw mut value).expose_provenance() as u64,
                        };
                        file.ioctl(virtio_gpu::GETPARAM, &mut argument)
                            .map_err(because("GETPARAM"))?;
                        expect(black_box(value) == 1, "the GPU has no 3D (virgl)")
                    }),
                    other => Err(format!("no GETPARAM to measure on host driver {other}")),
                }
            }
            Kind::Payload(size) => {
                let file = self.file.as_mut().ok_or(NO_GPU)?;
                let commands = self.source.as_bytes().get(..size);
                let commands = commands.ok_or("the payload is too long")?;
                timed(operations, || {
                    // No command starts with zeros.
                    let mut argument = soft::Submit {
                        commands: commands.as_ptr().expose_provenance() as u64,
                        commands_size: size as u32,
                        ..Default::default()
                    };
                    match file.ioctl(soft::DRM_IOCTL_SOFT_SUBMIT, &mut argument) {
                        Err(Errno::EINVAL) => Ok(()),
                        other => Err(format!("SUBMIT of zeros gave {other:?}, not EINVAL")),
                    }
                })
            }
            Kind::Memcpy(size) => {
                let source = self.source.as_bytes().get(..size);
                let source = source.ok_or("the payload is too long")?;
                let target = self.target.as_mut_bytes();
                timed(operations, || {
                    target[..size].copy_from_slice(black_box(source));
                    black_box(&mut *target);
                    Ok(())
                })
            }
            Kind::ApertureRead => {
                let mapping = self.buffer_object.as_ref().ok_or(NO_GPU)?;
                let target = self.target.as_mut_bytes();
                timed(operations, || {
                    mapping.read(0, target);
                    Ok(())
                })
            }
            Kind::ApertureWrite => {
                let mapping = self.buffer_object.as_mut().ok_or(NO_GPU)?;
                let source = self.source.as_bytes();
                timed(operations, || {
                    mapping.write(0, source);
                    Ok(())
                })
            }
            Kind::HostCopy => self.yardstick()?.host(register::COPY, operations),
            Kind::HostGetParam => self.yardstick()?.host(register::GETPARAM, operations),
        }
    }

    fn yardstick(&self) -> Result<&Yardstick, String> {
        let yardstick = self.yardstick.as_ref();
        yardstick.ok_or("no pvgpu.yardstick= on the command line: run `cargo xtask bench`".into())
    }

    fn session(&self) -> Result<&SharedSession, String> {
        self.session.as_ref().ok_or(NO_GPU.into())
    }

    fn map_buffer_object(&mut self) -> Result<GuestMapping, String> {
        let file = self.file.as_mut().ok_or(NO_GPU)?;
        let mut create = soft::GemCreate {
            size: COPY_SIZE as u64,
            ..Default::default()
        };
        file.ioctl(soft::DRM_IOCTL_SOFT_GEM_CREATE, &mut create)
            .map_err(because("GEM_CREATE"))?;
        let mut place = soft::GemMmap {
            handle: create.handle,
            ..Default::default()
        };
        file.ioctl(soft::DRM_IOCTL_SOFT_GEM_MMAP, &mut place)
            .map_err(because("GEM_MMAP"))?;
        file.map(place.offset, COPY_SIZE).map_err(because("map"))
    }
}

const NO_GPU: &str = "no GPU to measure";

impl Yardstick {
    fn at(address: u64) -> Result<Self, String> {
        let registers = Registers::new(address, 0x1000);
        let registers = registers.ok_or("pvgpu.yardstick= is not an address in 3..4 GiB")?;
        let words = Box::new(Words {
            question: AtomicU32::new(0),
            rest: [const { AtomicU32::new(0) }; ANSWER / 4],
        });
        let address = core::ptr::from_ref(&*words).expose_provenance();
        let address = u32::try_from(address).map_err(|_| "the heap is not below 4 GiB")?;
        registers.write(register::ADDRESS, address);
        Ok(Self { registers, words })
    }

    /// One question to the thread of the host, and its answer.
    fn ask(&self, number: &mut u32, bell: Option<u64>) -> Result<(), String> {
        *number = number.wrapping_add(1);
        self.words.question.store(*number, Ordering::Release);
        if let Some(bell) = bell {
            self.registers.write(bell, 0);
        }
        while self.words.answer().load(Ordering::Acquire) != *number {
            spin_loop();
        }
        Ok(())
    }

    /// Has the host do something that many times; nanoseconds by its own clock.
    fn host(&self, what: u64, operations: u32) -> Result<u64, String> {
        self.registers.write(what, operations);
        let low = self.registers.read(register::NANOSECONDS_LOW);
        match self.registers.read(register::NANOSECONDS_HIGH) {
            u32::MAX => Err("the host could not do it".into()),
            high => Ok(u64::from(high) << 32 | u64::from(low)),
        }
    }
}

/// Nanoseconds that the operations take, one after the other.
fn timed(
    operations: u32,
    mut operation: impl FnMut() -> Result<(), String>,
) -> Result<u64, String> {
    let start = clock::now_ns();
    for _ in 0..operations {
        operation()?;
    }
    Ok(clock::now_ns() - start)
}

/// The same with pauses between them, which do not count and in which the host falls asleep.
fn timed_apart(
    operations: u32,
    mut operation: impl FnMut() -> Result<(), String>,
) -> Result<u64, String> {
    let mut sum = 0;
    for _ in 0..operations {
        wait(FALL_ASLEEP_NS);
        sum += timed(1, &mut operation)?;
    }
    Ok(sum)
}

fn wait(nanoseconds: u64) {
    let start = clock::now_ns();
    while clock::now_ns() - start < nanoseconds {
        spin_loop();
    }
}

fn expect(condition: bool, otherwise: &str) -> Result<(), String> {
    if condition {
        Ok(())
    } else {
        Err(otherwise.into())
    }
}

/// An errno with the call that gave it.
fn because(what: &'static str) -> impl Fn(Errno) -> String {
    move |errno| format!("{what}: {errno}")
}
