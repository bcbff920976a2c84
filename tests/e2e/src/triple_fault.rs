//! What KVM did before a guest's triple fault, which tells nothing by itself: processor and guest are reset by it. KVM's events
//! go into the kernel's trace buffer, which stops at the first triple fault. For `l1-tests` on KVM for AMD processors.

use std::fs;
use std::io;

const TRACING: &str = "/sys/kernel/debug/tracing";

/// What a guest gets and what it leaves for.
const EVENTS: &[&str] = &[
    "kvm_exit",
    "kvm_inj_exception",
    "kvm_inj_virq",
    "kvm_page_fault",
];

fn write(file: &str, text: &str) -> io::Result<()> {
    fs::write(format!("{TRACING}/{file}"), text)
}

/// Begins to record.
pub fn watch() -> io::Result<()> {
    write(
        "kprobe_events",
        "p:pvgpu/triple_fault shutdown_interception",
    )?;
    write("events/pvgpu/triple_fault/trigger", "traceoff")?;
    write("events/pvgpu/triple_fault/enable", "1")?;
    for event in EVENTS {
        write(&format!("events/kvm/{event}/enable"), "1")?;
    }
    write("tracing_on", "1")
}

/// The last `count` events before the first triple fault since [`watch`]; `None` when there was none.
pub fn before(count: usize) -> io::Result<Option<String>> {
    if fs::read_to_string(format!("{TRACING}/tracing_on"))?.trim() == "1" {
        return Ok(None);
    }
    let trace = fs::read_to_string(format!("{TRACING}/trace"))?;
    let lines: Vec<&str> = trace.lines().collect();
    let last = lines.split_at(lines.len().saturating_sub(count)).1;
    Ok(Some(last.join("\n")))
}
