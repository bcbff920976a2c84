//! The bytes of one request, in front of a host driver that judges what comes through.
//!
//! Input: a byte that chooses the driver, whether the guest has said hello and whether it has memory to map with, two bytes for
//! the room of the response, the request. The file that a hello opens is object 1 and has handles of both sorts.

use crate::answering::{Answering, DRIVERS};
use crate::{hello, ioctl, judge, request};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::session::{Pending, Session};
use pvgpu_protocol::family::{core, soft, vgem, virtio_gpu};
use pvgpu_protocol::wire::{IoctlRequest, OpenRequest, Operation, RequestHeader, open};
use std::sync::Arc;
use std::sync::mpsc::channel;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// Small, so that short inputs reach them.
pub const LIMITS: Limits = Limits {
    message: 16 << 10,
    objects: 8,
    in_flight: 4,
    mapped: 1 << 20,
    memory: 1 << 20,
    handles: 8,
};

/// Bytes of the request's header and of an ioctl's body.
const IOCTL_HEADER: usize = size_of::<RequestHeader>() + size_of::<IoctlRequest>();

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let [choice, low, high, request @ ..] = bytes else {
        return;
    };
    let name = DRIVERS[usize::from(choice % 4).min(DRIVERS.len() - 1)];
    let room = usize::from(u16::from_le_bytes([*low, *high]));
    let driver = Answering::new(name, u64::from(choice >> 4) + 1, LIMITS.message);
    let answers = driver.answers();
    let (report, events) = channel::<Pending>();
    let report = Arc::new(move |event| report.send(event).unwrap_or(()));
    let driver = Arc::new(driver);
    let session = match choice & 8 {
        0 => Session::with_report(driver, None, LIMITS, report),
        _ => {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)]);
            let memory = GuestMemoryAtomic::new(memory.expect("memory"));
            Session::without_aperture(driver, memory, LIMITS, Some(report)).expect("scratch memory")
        }
    };
    if choice & 4 == 0 {
        for request in prelude(name) {
            let answered = session.perform(&request, 4096, || unreachable!("nothing waits"));
            assert!(answered.is_some());
        }
        answers.expect(request.get(IOCTL_HEADER..).unwrap_or_default());
    }

    let id = RequestHeader::read_from_prefix(request).map_or(0, |(header, _)| header.id.get());
    let room = room.max(size_of::<RequestHeader>());
    let (sender, later) = channel();
    let now = session.perform(request, room, || {
        Box::new(move |response| sender.send(response).unwrap_or(()))
    });
    // What waits is over when this returns.
    session.end();
    let later: Vec<_> = later.try_iter().collect();
    let responses: Vec<_> = now.iter().chain(&later).collect();
    let [response] = responses[..] else {
        panic!("{} responses to one request", responses.len());
    };
    let (result, _) = judge(response, id, room);
    assert!(events.try_iter().count() <= 1, "one watch, two events");
    let usage = session.usage();
    assert_eq!((usage.objects, usage.mapped, usage.in_flight), (0, 0, 0));
    assert_eq!(usage.memory, 0, "GPU memory is still booked");
    if choice & 4 != 0 {
        let operation = request.first().copied().unwrap_or_default();
        let hello = u16::from(operation) == Operation::Hello.number();
        assert!(result < 0 || hello, "performed before the hello");
    }
}

/// What a guest says before the request that is tried: afterwards file 1 has handles of both sorts.
pub fn prelude(driver: &str) -> Vec<Vec<u8>> {
    let body = OpenRequest {
        flags: open::RDWR.into(),
        reserved: 0.into(),
    };
    let mut requests = vec![hello(), request(Operation::Open, 0, 1, &body, &[])];
    let create = match driver {
        "soft" => {
            let create = soft::GemCreate {
                size: 4096,
                ..Default::default()
            };
            ioctl(1, 2, soft::DRM_IOCTL_SOFT_GEM_CREATE, create.as_bytes())
        }
        "vgem" => {
            let create = vgem::CreateDumb {
                width: 1,
                height: 1,
                bpp: 32,
                ..Default::default()
            };
            ioctl(1, 2, vgem::CREATE_DUMB, create.as_bytes())
        }
        _ => {
            let create = virtio_gpu::ResourceCreate::default();
            ioctl(1, 2, virtio_gpu::RESOURCE_CREATE, create.as_bytes())
        }
    };
    requests.push(create);
    let syncobj = core::SyncobjCreate::default();
    requests.push(ioctl(1, 3, core::SYNCOBJ_CREATE, syncobj.as_bytes()));
    requests
}
