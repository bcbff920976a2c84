//! The back end of vhost-user, message by message, in front of the embedded GPU: what generic front ends demand, and what a ring's
//! stop promises.

use pvgpu_host_proxy::device::{Device, DeviceConfig};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::vhost_user::{BackEnd, Disconnected, serve};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
/// Size of the guest's memory; the front end has it at that address, which is nowhere.
const MEMORY: u64 = 1 << 20;
const USER: u64 = 0x7000_0000_0000;
/// Entries of the ring, and where its parts are.
const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

type Served = JoinHandle<Result<(), Disconnected>>;

fn back_end(aperture: u64) -> Arc<Mutex<BackEnd>> {
    let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
    let config = DeviceConfig {
        request_queues: 2,
        ..DeviceConfig::default()
    };
    let device = Device::new(driver, None, config).unwrap();
    Arc::new(Mutex::new(BackEnd::new(device, aperture)))
}

/// A front end that has negotiated what it needs.
fn connect(back_end: &Arc<Mutex<BackEnd>>) -> (Frontend, Served) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = Arc::clone(back_end);
    let served = std::thread::spawn(move || serve(theirs, &back_end));
    let mut front_end = Frontend::from_stream(ours, 3);
    front_end.set_owner().unwrap();
    assert_ne!(front_end.get_features().unwrap() & PROTOCOL_FEATURES, 0);
    front_end.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK;
    front_end.set_protocol_features(wanted).unwrap();
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    (front_end, served)
}

/// A guest's memory with a ring in it, whose requests are one descriptor of no bytes: the device only gives them back.
struct Guest(File);

impl Guest {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        Self(file)
    }

    fn regions(&self) -> [VhostUserMemoryRegionInfo; 1] {
        [VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.0.as_raw_fd(),
        }]
    }

    fn offer(&self, count: u16) {
        self.0
            .write_all_at(&count.to_le_bytes(), AVAILABLE + 2)
            .unwrap();
    }

    fn used(&self) -> u16 {
        let mut index = [0; 2];
        self.0.read_exact_at(&mut index, USED + 2).unwrap();
        u16::from_le_bytes(index)
    }

    fn wait_for_used(&self, count: u16) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.used() != count {
            assert!(
                Instant::now() < deadline,
                "{} used, not {count}",
                self.used()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Starts ring 0 from `base`, without an interrupt.
fn start(front_end: &mut Frontend, base: u16, kick: &EventFd) {
    front_end.set_vring_base(0, base).unwrap();
    start_with_size(front_end, SIZE, kick).unwrap();
}

#[test]
fn any_part_of_the_configuration_is_answered_in_full() {
    let (mut front_end, served) = connect(&back_end(0));
    let whole = {
        let flags = VhostUserConfigFlags::empty();
        front_end.get_config(0, 64, flags, &[0; 64]).unwrap().1
    };
    assert_eq!(&whole[..4], b"PVGP".as_slice(), "{whole:?}");
    for (offset, size) in [
        (0, 1),
        (1, 2),
        (3, 4),
        (8, 8),
        (100, 4),
        (0xffc, 4),
        (0xfff, 1),
        (0, 0xff0),
    ] {
        let flags = VhostUserConfigFlags::empty();
        let (answer, bytes) = front_end
            .get_config(offset, size, flags, &vec![0; size as usize])
            .unwrap();
        assert_eq!((answer.size, bytes.len()), (size, size as usize));
        for (at, byte) in (offset as usize..).zip(bytes) {
            assert_eq!(
                byte,
                whole.get(at).copied().unwrap_or(0),
                "{offset:#x}+{size:#x}"
            );
        }
    }
    // A guest may write there.
    front_end
        .set_config(0, VhostUserConfigFlags::WRITABLE, &[1; 4])
        .unwrap();
    drop(front_end);
    served.join().unwrap().unwrap();
}

#[test]
fn what_generic_front_ends_cannot_do_is_not_offered_and_an_aperture_only_where_there_is_one() {
    for aperture in [0, 1 << 20] {
        let (mut front_end, _served) = connect(&back_end(aperture));
        let offered = front_end.get_protocol_features().unwrap();
        for never in [
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            VhostUserProtocolFeatures::DEVICE_STATE,
        ] {
            assert!(!offered.contains(never), "{never:?}");
        }
        assert!(offered.contains(VhostUserProtocolFeatures::REPLY_ACK));
        assert_eq!(
            offered.contains(VhostUserProtocolFeatures::SHMEM),
            aperture != 0
        );
        assert_eq!(front_end.get_queue_num().unwrap(), 3);
        front_end.set_protocol_features(offered).unwrap();
        if aperture != 0 {
            let regions = front_end.get_shmem_config().unwrap();
            assert_eq!((regions.nregions, regions.memory_sizes[0]), (1, aperture));
        }
    }
}

#[test]
fn a_stopped_ring_is_left_alone_and_goes_on_where_it_was_when_it_starts_again() {
    let (guest, kick) = (Guest::new(), EventFd::new(0).unwrap());
    let (mut front_end, served) = connect(&back_end(0));
    front_end
        .set_features(VERSION_1 | PROTOCOL_FEATURES)
        .unwrap();
    front_end.set_mem_table(&guest.regions()).unwrap();
    // There before the ring is: nobody rings for it.
    guest.offer(1);
    start(&mut front_end, 0, &kick);
    guest.wait_for_used(1);
    guest.offer(2);
    kick.write(1).unwrap();
    guest.wait_for_used(2);
    assert_eq!(front_end.get_vring_base(0).unwrap(), 2);
    guest.offer(4);
    kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(guest.used(), 2, "a stopped ring was worked on");
    start(&mut front_end, 2, &kick);
    guest.wait_for_used(4);
    front_end.set_vring_enable(0, false).unwrap();
    guest.offer(5);
    kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(guest.used(), 4, "a disabled ring was worked on");
    front_end.set_vring_enable(0, true).unwrap();
    guest.wait_for_used(5);
    drop(front_end);
    served.join().unwrap().unwrap();
    guest.offer(6);
    kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        guest.used(),
        5,
        "the ring of a front end that is gone was worked on"
    );
}

/// QEMU takes what is mapped in the aperture for memory of the guest, and shows it to the device as such.
#[test]
fn memory_that_comes_and_goes_or_cannot_be_mapped_ends_neither_connection_nor_session() {
    let (guest, kick) = (Guest::new(), EventFd::new(0).unwrap());
    let (mut front_end, served) = connect(&back_end(0));
    let offered = front_end.get_protocol_features().unwrap();
    front_end.set_protocol_features(offered).unwrap();
    front_end
        .set_features(VERSION_1 | PROTOCOL_FEATURES)
        .unwrap();
    front_end.set_mem_table(&guest.regions()).unwrap();
    start(&mut front_end, 0, &kick);
    let (unmappable, _other) = std::io::pipe().unwrap();
    let region = |number: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40 | number << 12,
        memory_size: 1 << 12,
        userspace_addr: USER | 1 << 40 | number << 12,
        mmap_offset: 0,
        mmap_handle: match number {
            50 => unmappable.as_raw_fd(),
            _ => guest.0.as_raw_fd(),
        },
    };
    for number in 0..200 {
        front_end.add_mem_region(&region(number)).unwrap();
    }
    guest.offer(1);
    kick.write(1).unwrap();
    guest.wait_for_used(1);
    for number in 0..200 {
        front_end.remove_mem_region(&region(number)).unwrap();
    }
    guest.offer(2);
    kick.write(1).unwrap();
    guest.wait_for_used(2);
    assert!(front_end.remove_mem_region(&region(7)).is_err());
    drop(front_end);
    let ended = served.join().unwrap();
    assert!(
        matches!(ended, Err(Disconnected::Malformed(_))),
        "{ended:?}"
    );
}

#[test]
fn a_front_end_that_breaks_the_rules_is_disconnected_and_the_next_one_is_served() {
    let back_end = back_end(1 << 20);
    let guest = Guest::new();
    let kick = EventFd::new(0).unwrap();
    type Breach = fn(&mut Frontend, &EventFd) -> bool;
    let breaches: [(&str, Breach); 6] = [
        ("a feature that is not offered", |front_end, _| {
            front_end.set_features(1 << 63).is_err()
        }),
        ("a protocol feature that is not offered", |front_end, _| {
            front_end
                .set_protocol_features(
                    VhostUserProtocolFeatures::INFLIGHT_SHMFD
                        | VhostUserProtocolFeatures::REPLY_ACK,
                )
                .is_err()
        }),
        ("a ring outside of memory", |front_end, _| {
            let nowhere = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                ..VringConfigData::default()
            };
            front_end.set_vring_addr(0, &nowhere).is_err()
        }),
        ("a ring of no size", |front_end, kick| {
            start_with_size(front_end, 0, kick).is_err()
        }),
        ("a ring whose size is no power of two", |front_end, kick| {
            start_with_size(front_end, 7, kick).is_err()
        }),
        ("a ring that is too long", |front_end, kick| {
            start_with_size(front_end, 32768, kick).is_err()
        }),
    ];
    for (what, breach) in breaches {
        let (mut front_end, served) = connect(&back_end);
        front_end
            .set_features(VERSION_1 | PROTOCOL_FEATURES)
            .unwrap();
        front_end.set_mem_table(&guest.regions()).unwrap();
        let refused = breach(&mut front_end, &kick);
        drop(front_end);
        let result = served.join().unwrap();
        assert!(refused, "{what}");
        assert!(
            matches!(result, Err(Disconnected::Malformed(_))),
            "{what}: {result:?}"
        );
    }
    let (front_end, served) = connect(&back_end);
    drop(front_end);
    served.join().unwrap().unwrap();
}

fn start_with_size(front_end: &mut Frontend, size: u16, kick: &EventFd) -> vhost::Result<()> {
    front_end.set_vring_num(0, size)?;
    let addresses = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: USER + DESCRIPTORS,
        used_ring_addr: USER + USED,
        avail_ring_addr: USER + AVAILABLE,
        log_addr: None,
    };
    front_end.set_vring_addr(0, &addresses)?;
    front_end.set_vring_kick(0, kick)?;
    front_end.set_vring_enable(0, true)
}
