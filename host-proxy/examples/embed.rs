//! The device in a VMM that is not mini-vmm: `cargo run -p pvgpu-host-proxy --example embed`.
//!
//! [`Vmm`] is what a VMM has anyway: guest memory, an interrupt, an event loop, and a transport that calls it at four moments. It has
//! no vCPU: `guest` plays the driver of a guest that says hello, where in a VMM the guest's kernel does.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use pvgpu_host_proxy::aperture::{Aperture, Reservation};
use pvgpu_host_proxy::device::{Device, DeviceConfig, Interrupt};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use std::error::Error;
use std::sync::Arc;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the device needs of it.
struct Vmm {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Its host addresses are to be a memory slot of the VM, and shared-memory region 0 of the device.
    window: Arc<Reservation>,
    device: Device,
    /// An irqfd of the VM, if it had one.
    interrupt: EventFd,
}

/// The device's interrupt: here one for all queues. With MSI-X, there is one for each.
struct Line(EventFd);

impl Interrupt for Line {
    fn signal_queue(&self, _queue: u16) {
        self.signal_config();
    }

    fn signal_config(&self) {
        let _ = self.0.write(1); // fails only when one is pending anyway
    }
}

impl Vmm {
    fn new() -> Result<Self, Box<dyn Error>> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
        // A real GPU: `DrmDriver::new("/dev/dri/renderD128")`. All that is left out here is in `DeviceConfig`.
        let driver = Arc::new(SoftDriver::new(SoftConfig::default())?);
        let window = Arc::new(Reservation::new(256 << 20)?);
        let aperture = Aperture::new(Arc::clone(&window) as _);
        let config = DeviceConfig {
            request_queues: 1, // one for each vCPU
            ..DeviceConfig::default()
        };
        Ok(Self {
            memory: GuestMemoryAtomic::new(memory),
            window,
            device: Device::new(driver, Some(aperture), config)?,
            interrupt: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The driver has written DRIVER_OK: the transport knows the features that it has accepted, and its queues.
    fn driver_ok(&mut self, features: u64, queues: Vec<Queue>) -> Result<(), Box<dyn Error>> {
        let line = Arc::new(Line(self.interrupt.try_clone()?));
        let memory = self.memory.clone();
        Ok(self.device.activate(memory, features, queues, line)?)
    }

    /// The driver has written QueueNotify. `device.doorbell(queue)` is an ioeventfd for it, which needs no exit.
    fn queue_notify(&self, queue: u16) {
        self.device.notify(queue);
    }
}

/// The event loop's part: in a VMM, KVM takes the interrupt from its irqfd, and nobody waits for it here.
struct Interrupted(EventFd);

impl MutEventSubscriber for Interrupted {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("epoll");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut vmm = Vmm::new()?;
    println!("memory slot at {:#x}", vmm.window.host_address());
    let queues = guest::set_up_queues(&vmm)?;
    vmm.driver_ok(vmm.device.features(), queues)?;
    guest::say_hello(&vmm)?;
    let mut events: EventManager<Interrupted> = EventManager::new()?;
    events.add_subscriber(Interrupted(vmm.interrupt.try_clone()?));
    events.run()?;
    println!("the guest has the GPU `{}`", guest::take_answer(&vmm)?);
    // Before the guest's memory goes away, and when its driver resets the device.
    vmm.device.reset();
    Ok(())
}

/// The other side: a driver with one request.
mod guest {
    use super::*;
    use pvgpu_protocol::control::{Hello, HelloReply, decode, encode};
    use pvgpu_protocol::wire::{Operation, RequestHeader, ResponseHeader};
    use vm_memory::{Bytes, GuestAddressSpace};
    use zerocopy::{FromBytes, IntoBytes};

    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const REQUEST: u64 = 0x4000;
    const RESPONSE: u64 = 0x5000;

    pub fn set_up_queues(vmm: &Vmm) -> Result<Vec<Queue>, Box<dyn Error>> {
        let sizes = vmm.device.queue_max_sizes().iter();
        let mut queues = sizes
            .map(|size| Queue::new(*size))
            .collect::<Result<Vec<_>, _>>()?;
        queues[0].try_set_desc_table_address(GuestAddress(DESCRIPTORS))?;
        queues[0].try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
        queues[0].try_set_used_ring_address(GuestAddress(USED))?;
        queues[0].set_ready(true);
        Ok(queues)
    }

    pub fn say_hello(vmm: &Vmm) -> Result<(), Box<dyn Error>> {
        let memory = vmm.memory.memory();
        let header = RequestHeader::new(Operation::Hello, 0, 0);
        let mut record = [0; 64];
        let length = encode(&Hello::new("embed"), &mut record)?;
        let request = [header.as_bytes(), &record[..length]].concat();
        memory.write_slice(&request, GuestAddress(REQUEST))?;
        // Two descriptors: an address, then length, flags (1: there is a next one, 2: the device writes it) and the next one's number.
        let first = request.len() as u64 | 1 << 32 | 1 << 48;
        let chain = [REQUEST, first, RESPONSE, 4096 | 2 << 32];
        memory.write_slice(chain.as_bytes(), GuestAddress(DESCRIPTORS))?;
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2))?;
        vmm.queue_notify(0);
        Ok(())
    }

    pub fn take_answer(vmm: &Vmm) -> Result<String, Box<dyn Error>> {
        let mut response = [0; 4096];
        let memory = vmm.memory.memory();
        memory.read_slice(&mut response, GuestAddress(RESPONSE))?;
        let (header, payload) = ResponseHeader::ref_from_prefix(&response).expect("aligned to 1");
        let length = usize::try_from(header.length.get())?;
        let reply: HelloReply = decode(&payload[..length])?;
        Ok(reply.driver.name.to_owned())
    }
}
