//! What the guest driver answers by itself is what the host driver would have answered.

use pvgpu_e2e::constants::{Guest, Question, compare, version};
use pvgpu_guest_driver::constants::Constants;
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::at;
use pvgpu_protocol::family::core::{self, GetCap, Version};
use pvgpu_protocol::family::virtio_gpu::{self, GetCaps, GetParam};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use zerocopy::IntoBytes;

/// A driver with the constants of `virtio_gpu`, written as the kernel's are.
struct Renderer {
    identity: Identity,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Whether the device was taken away.
    gone: AtomicBool,
    /// Calls so far.
    calls: AtomicU32,
}

struct File(Arc<State>, Identity);

/// Bytes of the renderer's capsets.
const CAPSET: usize = 300;

/// A renderer, and what becomes of it.
fn renderer(description: &str) -> (Arc<dyn HostDriver>, Arc<State>) {
    let state = Arc::<State>::default();
    let identity = Identity {
        name: "virtio_gpu".into(),
        version: [0, 1, -7],
        date: "0".into(),
        description: description.into(),
    };
    let driver = Renderer {
        identity,
        state: Arc::clone(&state),
    };
    (Arc::new(driver), state)
}

impl HostDriver for Renderer {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, _: u32) -> Result<Arc<dyn HostObject>, Errno> {
        let file = File(Arc::clone(&self.state), self.identity.clone());
        Ok(Arc::new(file))
    }
}

impl HostObject for File {
    fn ioctl(&self, call: &mut Call, _: &Cancel) -> Result<i32, Errno> {
        if self.0.gone.load(Ordering::SeqCst) {
            return Err(Errno::ENODEV);
        }
        self.0.calls.fetch_add(1, Ordering::SeqCst);
        match call.command() {
            core::VERSION => {
                let mut version: Version = call.read_argument();
                [
                    version.version_major,
                    version.version_minor,
                    version.version_patchlevel,
                ] = self.1.version;
                for (field, text) in [
                    (at!(Version.name), &self.1.name),
                    (at!(Version.date), &self.1.date),
                    (at!(Version.desc), &self.1.description),
                ] {
                    let buffer = call.array_mut(field);
                    let fits = text.len().min(buffer.len());
                    buffer[..fits].copy_from_slice(&text.as_bytes()[..fits]);
                }
                version.name_len = self.1.name.len() as u64;
                version.date_len = self.1.date.len() as u64;
                version.desc_len = self.1.description.len() as u64;
                call.write_argument(&version);
            }
            core::GET_CAP => {
                let mut cap: GetCap = call.read_argument();
                if cap.capability != core::cap::PRIME {
                    return Err(Errno::EOPNOTSUPP);
                }
                cap.value = 3;
                call.write_argument(&cap);
            }
            virtio_gpu::GETPARAM => {
                let param: GetParam = call.read_argument();
                if !(1..=8).contains(&param.param) {
                    return Err(Errno::EINVAL);
                }
                let value = u32::try_from(param.param).map_err(|_| Errno::EINVAL)? * 0x0101;
                call.array_mut(at!(GetParam.value))
                    .copy_from_slice(&value.to_le_bytes());
            }
            virtio_gpu::GET_CAPS => {
                let caps: GetCaps = call.read_argument();
                if caps.size == 0 || caps.cap_set_id > 2 {
                    return Err(Errno::EINVAL);
                }
                let buffer = call.array_mut(at!(GetCaps.addr));
                let length = buffer.len().min(CAPSET);
                for (byte, value) in buffer[..length].iter_mut().zip((1..=100).cycle()) {
                    *byte = value;
                }
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(0)
    }

    fn poll(&self, _: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        Ok(0)
    }
}

fn parameter(param: u64) -> Question {
    Question {
        command: virtio_gpu::GETPARAM,
        argument: GetParam { param, value: 0 }.as_bytes().to_vec(),
        buffers: vec![(at!(GetParam.value), 4)],
    }
}

#[test]
fn answers_of_the_guest_driver_are_those_of_the_embedded_gpu() {
    let driver = SoftDriver::new(SoftConfig::default()).unwrap();
    let driver: Arc<dyn HostDriver> = Arc::new(driver);
    let local = compare(&driver).unwrap_or_else(|error| panic!("{error}"));
    // VERSION twice each; then the parameters but for the one that changes, and the capabilities that are known.
    assert!(local > 30 + 13, "only {local} answers");
}

#[test]
fn answers_of_the_guest_driver_are_those_of_virtio_gpu() {
    let (driver, _) = renderer("virtio GPU");
    let local = compare(&driver).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(local, 30 + 8 + 4 + 1);
}

#[test]
fn a_version_may_have_more_room_than_could_ever_be_sent() {
    let (driver, _) = renderer("virtio GPU");
    let constants = Constants::new();
    let mut guest = Guest::new(driver, Some(&constants));
    let mut question = version([(16, true); 3]);
    let length = at!(Version.name_len).into();
    question.argument[length..length + 8].fill(0xff);
    let (result, argument, buffers) = guest.ask(&question);
    assert_eq!(result, Ok(0));
    assert_eq!(argument[length..length + 8], 10u64.to_le_bytes());
    assert_eq!(&buffers[0], b"virtio_gpu\xee\xee\xee\xee\xee\xee");
}

#[test]
fn a_version_that_the_guest_driver_has_no_room_for_is_the_hosts_to_tell() {
    let (driver, state) = renderer(&"long ".repeat(40));
    let constants = Constants::new();
    let mut guest = Guest::new(driver, Some(&constants));
    let (result, _, buffers) = guest.ask(&version([(256, true); 3]));
    assert_eq!((result, state.calls.load(Ordering::SeqCst)), (Ok(0), 1));
    assert!(buffers[2].starts_with(b"long long "));
}

#[test]
fn guests_that_share_a_table_ask_once_between_them() {
    let (driver, state) = renderer("virtio GPU");
    let constants = Constants::new();
    let mut guests = [0; 3].map(|_| Guest::new(Arc::clone(&driver), Some(&constants)));
    for guest in &mut guests {
        let before = guest.requests();
        for param in 1..=8 {
            let (result, _, buffers) = guest.ask(&parameter(param));
            let value = (param as u32 * 0x0101).to_le_bytes();
            assert_eq!((result, &buffers[0][..]), (Ok(0), &value[..]));
        }
        let sent = guest.requests() - before;
        assert!(sent == 0 || sent == 8, "{sent} requests");
    }
    assert_eq!(state.calls.load(Ordering::SeqCst), 8);
}

#[test]
fn a_question_that_failed_is_asked_again() {
    let (driver, state) = renderer("virtio GPU");
    let constants = Constants::new();
    let mut guest = Guest::new(driver, Some(&constants));
    for round in 1..=3 {
        assert_eq!(guest.ask(&parameter(77)).0, Err(Errno::EINVAL));
        assert_eq!(state.calls.load(Ordering::SeqCst), round);
    }
}

#[test]
fn a_lost_device_is_enodev_for_what_was_known_too() {
    let (driver, state) = renderer("virtio GPU");
    let constants = Constants::new();
    let mut guest = Guest::new(driver, Some(&constants));
    assert_eq!(guest.ask(&parameter(1)).0, Ok(0));
    assert_eq!(guest.ask(&version([(0, false); 3])).0, Ok(0));
    state.gone.store(true, Ordering::SeqCst);
    assert_eq!(guest.ask(&parameter(2)).0, Err(Errno::ENODEV));
    assert_eq!(guest.ask(&parameter(1)).0, Err(Errno::ENODEV));
    let version = guest.ask(&version([(0, false); 3])).0;
    assert_eq!(version, Err(Errno::ENODEV));
}
