//! Debian's kernels in L2 with the guest driver as a module: an unmodified program draws on its node what it draws
//! natively. The guest's first process is `l2-init`, the program is `native`.

use std::time::Duration;

use super::boot::{EXIT_CODE, PARAMETERS};
use super::mini_vmm::{Running, start};
use super::over::NO_APERTURE;
use super::pictures::{Gpu, SOFT, VGEM, VIRTIO_GPU, WATCHDOG, expected};
use super::{Failure, Test};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_linux_6_1_guest_draws_on_vgem_what_a_native_program_draws",
        run: || draws("6.1", &VGEM, "inline"),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draws("6.1", &VIRTIO_GPU, "inline"),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_virtio_gpu_with_a_worker_thread",
        run: || draws("6.1", &VIRTIO_GPU, "worker"),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_the_embedded_gpu_what_is_drawn_without_a_vm",
        run: || draws("6.1", &SOFT, "inline"),
    },
    Test {
        name: "a_linux_6_1_guest_without_an_aperture_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draw("6.1", &VIRTIO_GPU, "worker", NO_APERTURE),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_vgem_what_a_native_program_draws",
        run: || draws("6.12", &VGEM, "inline"),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draws("6.12", &VIRTIO_GPU, "inline"),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_virtio_gpu_with_a_worker_thread",
        run: || draws("6.12", &VIRTIO_GPU, "worker"),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_the_embedded_gpu_what_is_drawn_without_a_vm",
        run: || draws("6.12", &SOFT, "inline"),
    },
    Test {
        name: "a_linux_6_1_guest_on_pci_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draw("6.1", &VIRTIO_GPU, "inline", ON_PCI),
    },
    Test {
        name: "a_linux_6_1_guest_on_pci_draws_on_virtio_gpu_with_a_worker_thread",
        run: || draw("6.1", &VIRTIO_GPU, "worker", ON_PCI),
    },
    Test {
        name: "a_linux_6_12_guest_on_pci_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draw("6.12", &VIRTIO_GPU, "inline", ON_PCI),
    },
    Test {
        name: "a_linux_6_12_guest_on_pci_draws_on_virtio_gpu_with_a_worker_thread",
        run: || draw("6.12", &VIRTIO_GPU, "worker", ON_PCI),
    },
    Test {
        name: "a_linux_6_12_guest_without_an_aperture_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draw("6.12", &VIRTIO_GPU, "worker", NO_APERTURE),
    },
];

/// What mini-vmm is told for a GPU on PCI; without it, the GPU is on virtio-mmio.
pub const ON_PCI: &[&str] = &["--transport", "pci"];

/// Booting takes seconds, and the embedded GPU draws twice, emulated; minutes when the machine has other things to do.
const LIMIT: Duration = Duration::from_secs(240);

/// A Linux to be started in L2.
pub struct Guest<'a> {
    /// Which kernel: a folder in `/boot`.
    pub kernel: &'a str,
    /// RAM, as mini-vmm is told.
    pub memory: &'a str,
    /// Processors.
    pub cpus: &'a str,
    /// What the first process is told beside its exit code ([`EXIT_CODE`]).
    pub parameters: &'a str,
    /// The GPU, as mini-vmm is told.
    pub gpu: &'a str,
    /// What else mini-vmm is told. An `--initrd` is unpacked after the kernel's own.
    pub options: &'a [&'a str],
}

impl Guest<'_> {
    /// Starts it.
    pub fn start(&self) -> Result<Running, Failure> {
        let folder = format!("/boot/{}", self.kernel);
        let kernel = format!("{folder}/vmlinux");
        let initramfs = format!("{folder}/l2.cpio");
        let parameters = format!("{PARAMETERS} l2.exit={EXIT_CODE} {}", self.parameters);
        let mut arguments = vec!["--kernel", &kernel, "--initrd", &initramfs];
        arguments.extend(["--memory", self.memory, "--cpus", self.cpus]);
        arguments.extend(["--cmdline", &parameters, "--gpu", self.gpu]);
        arguments.extend(self.options);
        start(&arguments)
    }
}

fn draws(kernel: &str, gpu: &Gpu, doorbell: &str) -> Result<(), Failure> {
    draw(kernel, gpu, doorbell, &[])
}

/// Draws on the GPU in a guest with that kernel, once for each of two times that the module is loaded, and checks the
/// pictures; mini-vmm gets `options`, too.
pub fn draw(kernel: &str, gpu: &Gpu, doorbell: &str, options: &[&str]) -> Result<(), Failure> {
    let options = [&["--doorbell", doorbell, "--watchdog", WATCHDOG], options].concat();
    draw_on(kernel, gpu, &(gpu.argument)()?, &options)
}

/// As [`draw`], with that `--gpu`.
pub fn draw_on(kernel: &str, gpu: &Gpu, argument: &str, options: &[&str]) -> Result<(), Failure> {
    let picture = expected(gpu)?;
    let guest = Guest {
        kernel,
        memory: "512M",
        cpus: "1",
        parameters: &format!("l2.draw={}", gpu.name),
        gpu: argument,
        options,
    };
    let ended = guest.start()?.wait(LIMIT)?;
    ended.expect(EXIT_CODE)?;
    let expected = format!(
        "picture {}x{} {:016x}",
        picture.width,
        picture.height,
        picture.fingerprint()
    );
    // Once for each time that the module was loaded.
    let found = ended.output.lines().filter(|line| line.trim() == expected);
    let count = found.count();
    ensure!(
        count == 2,
        "the guest has drawn `{expected}` {count} times, not twice: {}",
        ended.tail()
    );
    Ok(())
}
