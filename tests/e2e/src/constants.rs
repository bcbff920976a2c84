//! Holds answers that the guest driver gives by itself against those of the host driver: the same question is asked in a
//! session that sends everything, and twice in one that does not. The tests call it with drivers of this process, the
//! testbed with the kernel's.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use pvgpu_guest_driver::constants::Constants;
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{ObjectId, Session};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::at;
use pvgpu_protocol::family::core::{self, GetCap, Version};
use pvgpu_protocol::family::virtio_gpu::{self, GetCaps, GetParam};
use pvgpu_protocol::family::{self, soft};
use pvgpu_protocol::schema::Answer;
use pvgpu_protocol::wire::open;
use zerocopy::IntoBytes;

use crate::loopback::Loopback;

/// What is in buffers before the call. It must be there after the call where the driver has not written.
const FILLING: u8 = 0xee;

/// One call: its command, its argument, and buffers that fields of the argument point to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The command.
    pub command: u32,
    /// The argument's bytes.
    pub argument: Vec<u8>,
    /// Offset of each pointer field in the argument with the length of its buffer.
    pub buffers: Vec<(u16, usize)>,
}

/// What a call's result and memory are afterwards.
pub type Outcome = (Result<i32, Errno>, Vec<u8>, Vec<Vec<u8>>);

/// A guest with one open file.
pub struct Guest<'a> {
    session: Session<'a, Loopback>,
    file: ObjectId,
}

impl<'a> Guest<'a> {
    /// A guest of that driver, which keeps answers in `constants` if there are any.
    pub fn new(driver: Arc<dyn HostDriver>, constants: Option<&'a Constants>) -> Self {
        let host = HostSession::new(driver, None, Limits::default());
        let session = Session::connect(Loopback::new(host), "constants").expect("a hello");
        let mut session = match constants {
            Some(constants) => session.with_constants(constants),
            None => session,
        };
        let file = session.open(open::RDWR).expect("a file");
        Self { session, file }
    }

    /// Asks, and says what came of it.
    pub fn ask(&mut self, question: &Question) -> Outcome {
        let mut argument = question.argument.clone();
        let mut buffers: Vec<_> = question
            .buffers
            .iter()
            .map(|(_, length)| vec![FILLING; *length])
            .collect();
        for ((field, _), buffer) in question.buffers.iter().zip(&mut buffers) {
            let address = buffer.as_mut_ptr().expose_provenance() as u64;
            argument[field_bytes(*field)].copy_from_slice(&address.to_ne_bytes());
        }
        let address = argument.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the argument's pointers are null or lead to the buffers here, which are as long as its counts say.
        let mut caller = unsafe { Flat::new() };
        let result = self
            .session
            .ioctl(self.file, question.command, address, &mut caller);
        // Addresses differ from call to call.
        for (field, _) in &question.buffers {
            argument[field_bytes(*field)].fill(0);
        }
        (result, argument, buffers)
    }

    /// Requests sent so far.
    pub fn requests(&mut self) -> u64 {
        self.session.channel().submitted()
    }
}

fn field_bytes(offset: u16) -> Range<usize> {
    let start = usize::from(offset);
    start..start + 8
}

fn plain<T: IntoBytes + zerocopy::Immutable>(command: u32, argument: &T) -> Question {
    Question {
        command,
        argument: argument.as_bytes().to_vec(),
        buffers: Vec::new(),
    }
}

/// A `VERSION` with room for so many bytes of each string; without a buffer where there is `None`.
pub fn version(room: [(u64, bool); 3]) -> Question {
    let argument = Version {
        name_len: room[0].0,
        date_len: room[1].0,
        desc_len: room[2].0,
        ..Default::default()
    };
    let fields = [at!(Version.name), at!(Version.date), at!(Version.desc)];
    let buffers = fields.iter().zip(room).filter(|(_, (_, buffer))| *buffer);
    Question {
        buffers: buffers
            .map(|(field, (length, _))| (*field, usize::try_from(length).expect("a length")))
            .collect(),
        ..plain(core::VERSION, &argument)
    }
}

/// Questions to a driver of that name, good ones and bad ones: some of every ioctl that it need not answer each time.
fn questions(driver: &str) -> Vec<Question> {
    let mut questions = Vec::new();
    for room in [0, 1, 3, 5, 10, 64, 4096] {
        questions.push(version([(room, true); 3]));
        questions.push(version([(room, false), (2, true), (room, true)]));
    }
    questions.push(version([(0, false); 3]));
    questions.extend((0..0x20).map(|capability| {
        plain(
            core::GET_CAP,
            &GetCap {
                capability,
                value: 0x5555,
            },
        )
    }));
    match driver {
        "soft" => questions.extend((0..=soft::param::QUEUE_MAX + 1).map(|param| {
            let argument = soft::GetParam { param, value: 9 };
            plain(soft::DRM_IOCTL_SOFT_GETPARAM, &argument)
        })),
        "virtio_gpu" => {
            questions.extend(
                (0..=virtio_gpu::param::EXPLICIT_DEBUG_NAME + 1).map(|param| {
                    let argument = virtio_gpu::GetParam { param, value: 0 };
                    Question {
                        buffers: vec![(at!(GetParam.value), 4)],
                        ..plain(virtio_gpu::GETPARAM, &argument)
                    }
                }),
            );
            for (cap_set_id, cap_set_ver, size) in [
                (1, 1, 308),
                (1, 1, 16),
                (1, 1, 4096),
                (2, 2, 4096),
                (1, 1, 0),
                (99, 1, 64),
            ] {
                let argument = virtio_gpu::GetCaps {
                    cap_set_id,
                    cap_set_ver,
                    size,
                    ..Default::default()
                };
                questions.push(Question {
                    buffers: vec![(at!(GetCaps.addr), size as usize)],
                    ..plain(virtio_gpu::GET_CAPS, &argument)
                });
            }
        }
        _ => {}
    }
    questions
}

/// Asks a driver everything that cannot change, and says how many answers came without a request; an error names the
/// first answer that was not the driver's own.
pub fn compare(driver: &Arc<dyn HostDriver>) -> Result<u64, String> {
    let name = driver.identity().name.clone();
    let constants = Constants::new();
    let mut sending = Guest::new(Arc::clone(driver), None);
    let mut keeping = Guest::new(Arc::clone(driver), Some(&constants));
    let mut asked = BTreeSet::new();
    let mut local = 0;
    for question in questions(&name) {
        let ioctl = family::find(family::of_driver(&name), question.command)
            .map_err(|errno| format!("{:#x}: {errno}", question.command))?;
        asked.insert(ioctl.name);
        let sent = sending.ask(&question);
        for round in 1..=2 {
            let before = keeping.requests();
            let kept = keeping.ask(&question);
            if kept != sent {
                return Err(format!(
                    "{question:?} gives {kept:?} the {round}. time, the driver's answer is {sent:?}"
                ));
            }
            let succeeded = kept.0.is_ok();
            let expected = match ioctl.answer {
                Answer::Identity => true,
                _ => round > 1 && succeeded && ioctl.is_constant(&question.argument),
            };
            if (keeping.requests() == before) != expected {
                return Err(format!(
                    "the {round}. {question:?} was {} although it gives {kept:?}",
                    if expected { "sent" } else { "not sent" }
                ));
            }
            local += u64::from(expected);
        }
    }
    let families = family::of_driver(&name).iter();
    let constant = families
        .flat_map(|family| family.ioctls)
        .filter(|ioctl| ioctl.answer != Answer::Forwarded);
    for ioctl in constant {
        if !asked.contains(ioctl.name) {
            return Err(format!("nothing was asked of {}", ioctl.name));
        }
    }
    Ok(local)
}
