//! The GPU's transport as a guest on KVM sees it. What travels through its queues is tested end to end
//! elsewhere; here a host driver without a device is enough.

mod kernels;
mod machine;

use std::sync::Arc;

use kernels::with_kvm;
use machine::boot;
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::device::{Device, DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity};
use pvgpu_mini_vmm::{DumpTarget, Ending, Gpu, Outcome, Transport, layout, virtio_mmio};

/// A host whose GPU cannot be opened.
struct Unplugged(Identity);

impl HostDriver for Unplugged {
    fn identity(&self) -> &Identity {
        &self.0
    }
    fn open(&self, _: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Err(Errno::ENODEV)
    }
}

fn gpu(aperture: u64, doorbell: Doorbell) -> Gpu {
    let identity = Identity {
        name: "unplugged".into(),
        version: [1, 0, 0],
        date: String::new(),
        description: String::new(),
    };
    Gpu::InProcess {
        driver: Arc::new(Unplugged(identity)),
        aperture,
        device: DeviceConfig {
            doorbell,
            queue_size: 64,
            ..DeviceConfig::default()
        },
    }
}

fn registers(aperture: u64) -> [u32; 10] {
    let (outcome, _) = boot(&kernels::elf(kernels::gpu_registers()), |config| {
        config.gpu = Some(gpu(aperture, Doorbell::Inline));
        config.dump = Some(DumpTarget::Memory);
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 0 });
    let dump = outcome.dump.unwrap();
    std::array::from_fn(|i| u32::from_le_bytes(dump[4 * i..4 * i + 4].try_into().unwrap()))
}

#[test]
fn a_guest_finds_the_gpu_and_its_aperture() {
    if !with_kvm() {
        return;
    }
    let [
        magic,
        version,
        device,
        vendor,
        base_low,
        base_high,
        length_low,
        length_high,
        queue,
        config,
    ] = registers(64 << 20);
    assert_eq!(
        (magic, version, device, vendor),
        (virtio_mmio::MAGIC, 2, 63, virtio_mmio::VENDOR)
    );
    assert_eq!(
        u64::from(base_high) << 32 | u64::from(base_low),
        layout::APERTURE_BASE
    );
    assert_eq!(
        u64::from(length_high) << 32 | u64::from(length_low),
        64 << 20
    );
    assert_eq!(queue, 64);
    assert_eq!(config, pvgpu_host_proxy_magic());
}

/// The first word of configuration space, by the device's own account.
fn pvgpu_host_proxy_magic() -> u32 {
    let gpu = gpu(0, Doorbell::Inline);
    let Gpu::InProcess { driver, device, .. } = gpu else {
        panic!("{gpu:?}");
    };
    let device: Device = Device::new(driver, None, device).unwrap();
    let mut word = [0; 4];
    device.read_config(0, &mut word);
    assert_ne!(word, [0; 4]);
    u32::from_le_bytes(word)
}

#[test]
fn a_gpu_without_an_aperture_has_no_shared_memory_region() {
    if !with_kvm() {
        return;
    }
    assert_eq!(registers(0)[4..8], [u32::MAX; 4]);
}

fn ring(transport: Transport, doorbell: Doorbell) -> Outcome {
    let kernel = match transport {
        Transport::Mmio => kernels::gpu_start(),
        Transport::Pci => kernels::gpu_on_pci(),
    };
    let (outcome, _) = boot(&kernels::elf(kernel), |config| {
        config.gpu = Some(gpu(2 << 20, doorbell));
        config.transport = transport;
    });
    assert_eq!(
        outcome.ending,
        Ending::Exit { code: 0xf },
        "status: in operation"
    );
    outcome
}

#[test]
fn an_inline_doorbell_is_an_exit() {
    if !with_kvm() {
        return;
    }
    for transport in [Transport::Mmio, Transport::Pci] {
        let outcome = ring(transport, Doorbell::Inline);
        assert_eq!(outcome.doorbell_exits, 1, "{transport:?}");
        assert_eq!(outcome.gpu.unwrap().doorbells, 1, "{transport:?}");
    }
}

#[test]
fn a_worker_doorbell_goes_through_the_kernel_without_an_exit() {
    if !with_kvm() {
        return;
    }
    for transport in [Transport::Mmio, Transport::Pci] {
        let inline = ring(transport, Doorbell::Inline);
        let worker = ring(transport, Doorbell::Worker);
        assert_eq!(worker.doorbell_exits, 0, "{transport:?}");
        assert_eq!(worker.exits.mmio_writes + 1, inline.exits.mmio_writes);
    }
}
