//! The messages of a hostile front end, with any descriptors, in front of the vhost-user back end.
//!
//! Input: whether the connection is negotiated first, then messages: those that there are, with numbers near the right ones, and bytes
//! that are none. Whatever they are, the connection ends when they do, the guest's session with it, and the next front end is served as if
//! nobody had been there.

use crate::answering::Answering;
use crate::decode::LIMITS;
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::device::{Device, DeviceConfig};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::vhost_user::{BackEnd, serve};
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes of the guest's memory, and where the front end has it.
const MEMORY: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000_0000;
/// Most messages of an input: nobody reads the answers, which must fit into the socket.
const MESSAGES_MAX: usize = 24;
/// Most bytes of a message's body.
const BODY_MAX: usize = 512;
/// Protocol features of vhost-user that the back end offers, and features.
const PROTOCOL_FEATURES: u64 = 0x40_a629;
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
/// Numbers of requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;

/// A back end for all inputs: a device takes longer to make than an input to run.
static BACK_END: LazyLock<Arc<Mutex<BackEnd>>> = LazyLock::new(|| {
    let driver = Answering::new("virtio_gpu", 1, LIMITS.message);
    let config = DeviceConfig {
        request_queues: 2,
        poll: Duration::ZERO,
        limits: LIMITS,
        sandbox: Sandbox::Off,
        ..DeviceConfig::default()
    };
    let device = Device::new(Arc::new(driver), None, config).expect("eventfds");
    Arc::new(Mutex::new(BackEnd::new(device, 1 << 20)))
});

/// The guest's memory: all zeros, in a file that has no name.
static GUEST: LazyLock<File> = LazyLock::new(|| {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(MEMORY).expect("room for some pages");
    file
});

/// What is attached to a message.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Attached {
    Memory,
    /// What can be waited for, as an eventfd can.
    Doorbell,
    Socket,
    /// What cannot be waited for.
    Null,
}

impl Attached {
    fn open(self) -> OwnedFd {
        let opened = match self {
            Self::Memory => GUEST.try_clone().map(OwnedFd::from),
            Self::Doorbell => std::io::pipe().map(|(reader, _)| reader.into()),
            Self::Socket => UnixStream::pair().map(|(socket, _)| socket.into()),
            Self::Null => File::open("/dev/null").map(OwnedFd::from),
        };
        opened.expect("descriptors")
    }
}

/// What follows a header.
#[derive(Arbitrary, Debug)]
enum Body {
    Nothing,
    Number(u64),
    /// Ring and number.
    Ring {
        index: u8,
        number: u16,
    },
    /// Ring, flags and the places of its parts in the guest's memory.
    Addresses {
        index: u8,
        parts: [u16; 3],
    },
    /// Regions: guest-physical and user address, in units of the memory's size, and offset in its file.
    Regions(Vec<(u8, u8, u16)>),
    /// Offset, size, flags, and the bytes that are to be there.
    Config {
        offset: u16,
        size: u8,
        flags: u8,
    },
    Bytes(Vec<u8>),
}

impl Body {
    fn bytes(&self) -> Vec<u8> {
        let region = |&(guest, user, offset): &(u8, u8, u16)| {
            let at = |count: u8| u64::from(count) * MEMORY;
            [
                at(guest),
                MEMORY - u64::from(offset),
                USER + at(user),
                offset.into(),
            ]
            .map(u64::to_ne_bytes)
            .concat()
        };
        let mut bytes = match self {
            Self::Nothing => Vec::new(),
            Self::Number(number) => number.to_ne_bytes().to_vec(),
            Self::Ring { index, number } => [u32::from(*index), u32::from(*number)]
                .map(u32::to_ne_bytes)
                .concat(),
            Self::Addresses { index, parts } => {
                let [descriptors, used, available] = parts.map(|part| USER + u64::from(part));
                let index = u64::from(*index);
                [index, descriptors, used, available, 0]
                    .map(u64::to_ne_bytes)
                    .concat()
            }
            Self::Regions(regions) => {
                let regions: Vec<_> = regions.iter().take(8).map(region).collect();
                let count = (regions.len() as u64).to_ne_bytes().to_vec();
                [count, regions.concat()].concat()
            }
            Self::Config {
                offset,
                size,
                flags,
            } => {
                let head = [u32::from(*offset), u32::from(*size), u32::from(*flags & 3)];
                [
                    head.map(u32::to_ne_bytes).concat(),
                    vec![0; usize::from(*size)],
                ]
                .concat()
            }
            Self::Bytes(bytes) => bytes.clone(),
        };
        bytes.truncate(BODY_MAX);
        bytes
    }
}

/// Something that a front end sends.
#[derive(Arbitrary, Debug)]
enum Message {
    /// A header that fits its body.
    Whole {
        request: u8,
        acknowledge: bool,
        body: Body,
        attached: Vec<Attached>,
    },
    /// Anything.
    Raw {
        bytes: Vec<u8>,
        attached: Option<Attached>,
    },
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags | 1, u32::try_from(body.len()).unwrap_or(0)];
    [&header.map(u32::to_ne_bytes).concat()[..], body].concat()
}

fn send(socket: &UnixStream, bytes: &[u8], attached: &[OwnedFd]) {
    let descriptors: Vec<_> = attached.iter().map(AsRawFd::as_raw_fd).collect();
    if !bytes.is_empty() {
        socket
            .send_with_fds(&[bytes], &descriptors)
            .expect("the other end is there");
    }
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    // Too few bytes are no input.
    let _ = attack(Unstructured::new(bytes));
}

fn attack(mut input: Unstructured<'_>) -> Result<()> {
    let (ours, theirs) = UnixStream::pair().expect("a socket");
    if input.arbitrary()? {
        negotiate(&ours);
    }
    for step in input.arbitrary_iter()?.take(MESSAGES_MAX) {
        match step? {
            Message::Whole {
                request,
                acknowledge,
                body,
                attached,
            } => {
                let request = u32::from(request % 48);
                let flags = if acknowledge { 8 } else { 0 };
                let attached: Vec<_> = attached.iter().take(8).map(|kind| kind.open()).collect();
                send(&ours, &message(request, flags, &body.bytes()), &attached);
            }
            Message::Raw { bytes, attached } => {
                let attached = attached.map(Attached::open);
                let bytes = bytes.get(..bytes.len().min(BODY_MAX)).unwrap_or_default();
                send(&ours, bytes, attached.as_slice());
            }
        }
    }
    ours.shutdown(Shutdown::Write).expect("a connected socket");
    // Either way it is over.
    let _ = serve(theirs, &BACK_END);
    drop(ours);
    next_front_end_is_served();
    Ok(())
}

/// What every front end does first, with a ring that is described and no more.
fn negotiate(socket: &UnixStream) {
    let number = |request, number: u64| message(request, 0, &number.to_ne_bytes());
    send(socket, &message(GET_FEATURES, 0, &[]), &[]);
    send(socket, &message(GET_PROTOCOL_FEATURES, 0, &[]), &[]);
    send(
        socket,
        &number(SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES),
        &[],
    );
    send(socket, &number(SET_FEATURES, FEATURES), &[]);
    let table = message(SET_MEM_TABLE, 0, &Body::Regions(vec![(0, 0, 0)]).bytes());
    send(socket, &table, &[Attached::Memory.open()]);
}

/// A new front end gets the features.
fn next_front_end_is_served() {
    let (mut ours, theirs) = UnixStream::pair().expect("a socket");
    ours.write_all(&message(GET_FEATURES, 0, &[]))
        .expect("room");
    ours.shutdown(Shutdown::Write).expect("a connected socket");
    serve(theirs, &BACK_END).expect("a front end that has done nothing wrong");
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).expect("an answer");
    assert_eq!(answer.len(), 20, "{answer:?}");
    let features = u64::from_ne_bytes(answer[12..].try_into().expect("8 bytes"));
    assert_eq!(features & FEATURES, FEATURES);
}
