//! The machine that was measured, by name: numbers mean nothing without it.

use std::fs;

use serde::Serialize;

/// What is said of a machine.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// As the kernel calls the processor.
    pub processor: String,
    /// Processors that the kernel has.
    pub processors: usize,
    /// The kernel's version.
    pub kernel: String,
    /// What KVM runs guests with: `kvm_intel` and `kvm_amd` are hardware, `kvm_pvm` is software.
    pub kvm: String,
    /// Average number of processes that ran in the last minute: more than one disturbs.
    pub load: String,
}

/// This machine.
pub fn describe() -> Host {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    let kvm = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| fs::exists(format!("/sys/module/{module}")).unwrap_or(false));
    Host {
        processor: model.trim().to_owned(),
        processors: std::thread::available_parallelism().map_or(1, Into::into),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        kvm: kvm.unwrap_or("unknown").to_owned(),
        load: read("/proc/loadavg")
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned(),
    }
}
