//! What a node does beside its ioctls' own meaning: the program `node-semantics` sees on the node of a Linux guest with two
//! processors what it sees natively, and leaves nothing on the host. `l2-init` runs it in the guest.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pvgpu_protocol::control::decode_trace;
use pvgpu_protocol::family::core::PRIME_HANDLE_TO_FD;
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use zerocopy::FromBytes;

use super::boot::EXIT_CODE;
use super::linux::{Guest, ON_PCI};
use super::over::{self, NO_APERTURE};
use super::pictures::{Gpu, SOFT, VGEM, VIRTIO_GPU};
use super::{Failure, Test};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_linux_6_1_guest_has_the_semantics_of_a_vgem_node",
        run: || semantics("6.1", &VGEM, "inline", true, &[]),
    },
    Test {
        name: "a_linux_6_1_guest_has_the_semantics_of_a_virtio_gpu_node",
        run: || semantics("6.1", &VIRTIO_GPU, "inline", true, &[]),
    },
    Test {
        name: "a_linux_6_1_guest_has_the_semantics_of_a_node_on_the_embedded_gpu",
        run: || semantics("6.1", &SOFT, "inline", false, &[]),
    },
    Test {
        name: "a_linux_6_12_guest_has_the_semantics_of_a_virtio_gpu_node_with_a_worker_thread",
        run: || semantics("6.12", &VIRTIO_GPU, "worker", true, &[]),
    },
    Test {
        name: "a_linux_6_1_guest_without_an_aperture_has_the_semantics_of_a_virtio_gpu_node",
        run: || semantics("6.1", &VIRTIO_GPU, "worker", true, NO_APERTURE),
    },
    Test {
        name: "a_linux_6_12_guest_without_an_aperture_has_the_semantics_of_a_virtio_gpu_node",
        run: || semantics("6.12", &VIRTIO_GPU, "inline", true, NO_APERTURE),
    },
    Test {
        name: "a_linux_6_12_guest_has_the_semantics_of_a_node_on_the_embedded_gpu_with_a_worker_thread",
        run: || semantics("6.12", &SOFT, "worker", false, &[]),
    },
    Test {
        name: "a_linux_6_1_guest_on_pci_has_the_semantics_of_a_virtio_gpu_node",
        run: || semantics("6.1", &VIRTIO_GPU, "inline", true, ON_PCI),
    },
];

/// Forty loads of the module among it.
const LIMIT: Duration = Duration::from_secs(180);

/// What the checks say, without those of the guest alone.
fn lines(output: &str) -> Vec<&str> {
    output
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("check "))
        .collect()
}

fn semantics(
    kernel: &str,
    gpu: &Gpu,
    doorbell: &str,
    native: bool,
    options: &[&str],
) -> Result<(), Failure> {
    let trace = std::env::temp_dir().join("semantics.trace");
    let traced = trace.to_string_lossy();
    let no_aperture = over::parameter(options);
    let always = [
        "--doorbell",
        doorbell,
        "--trace",
        &traced,
        "--watchdog",
        "170",
    ];
    let guest = Guest {
        kernel,
        memory: "512M",
        cpus: "2",
        parameters: &format!("l2.semantics={}{no_aperture}", gpu.name),
        gpu: &(gpu.argument)()?,
        options: &[&always[..], options].concat(),
    };
    let ended = guest.start()?.wait(LIMIT)?;
    let wrong = ended
        .output
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("WRONG") || line.starts_with("node-semantics: "));
    let wrong = wrong.collect::<Vec<_>>().join(", ");
    ensure!(wrong.is_empty(), "in the guest: {wrong}");
    ended.expect(EXIT_CODE)?;
    let seen = lines(&ended.output);
    if native {
        let output = Command::new("/bin/node-semantics")
            .args(["--driver", gpu.name])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "natively: {said}");
        for line in lines(&said) {
            ensure!(
                seen.contains(&line),
                "natively there is `{line}`, but in the guest: {seen:?}"
            );
        }
    }
    let requests = fs::read(&trace)?;
    fs::remove_file(&trace)?;
    nothing_is_left(&requests)
}

/// In the first session of the trace, which ended when all programs had, every object was closed and every mapping removed;
/// and both processors used queues of their own.
fn nothing_is_left(mut trace: &[u8]) -> Result<(), Failure> {
    let (mut hellos, mut objects, mut mappings) = (0, (0, 0), (0, 0));
    let mut queues = [0u32; 2];
    while !trace.is_empty() {
        let (record, length) = decode_trace(trace)?;
        trace = &trace[length..];
        let Ok((header, body)) = RequestHeader::read_from_prefix(record.request) else {
            continue;
        };
        let operation = Operation::from_number(header.operation.get());
        hellos += u32::from(operation == Some(Operation::Hello));
        if hellos > 1 {
            break;
        }
        if let Some(count) = queues.get_mut(usize::from(record.queue)) {
            *count += 1;
        }
        if record.result < 0 {
            continue;
        }
        match operation {
            Some(Operation::Open) => objects.0 += 1,
            Some(Operation::Ioctl) => {
                let export = IoctlRequest::read_from_prefix(body)
                    .is_ok_and(|(ioctl, _)| ioctl.command.get() == PRIME_HANDLE_TO_FD);
                objects.0 += u32::from(export);
            }
            Some(Operation::Close) => objects.1 += 1,
            Some(Operation::Map | Operation::MapPages) => mappings.0 += 1,
            Some(Operation::Unmap) => mappings.1 += 1,
            _ => {}
        }
    }
    ensure!(
        objects.0 == objects.1 && objects.0 > 100,
        "{} objects were made and {} closed",
        objects.0,
        objects.1
    );
    ensure!(
        mappings.0 == mappings.1 && mappings.0 > 100,
        "{} mappings were made and {} removed",
        mappings.0,
        mappings.1
    );
    ensure!(
        queues.iter().all(|count| *count > 50),
        "the request queues had {queues:?} requests"
    );
    Ok(())
}
