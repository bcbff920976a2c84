//! `cargo xtask TASK`: the project's tasks, one file per task, nothing else here.
//! People and `.ci/run` call it; the product never does.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod command;
mod coverage;
mod demo;
mod dkms;
mod docs;
mod fuzz;
mod fuzz_vm;
mod linux_demo;
mod lock_file;
mod memory_safety;
mod packages;
mod programs;
mod qemu;
mod replay;
mod say;
mod soak;
mod test;
mod test_programs;
mod testbed;
mod trace;
mod unsafe_lines;

/// The project's tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

/// One entry per task; the task's file holds its arguments and its `run`.
#[derive(Subcommand)]
enum Task {
    /// Measure round trips and bandwidths in a guest, each beside its floor
    Bench(bench::Arguments),
    /// Show which lines the tests run of the code that a guest's bytes go through
    Coverage(coverage::Arguments),
    /// Run the end-to-end tests inside a virtual machine with real GPU drivers and nested KVM
    Testbed(testbed::Arguments),
    /// Write the pages of docs/ that are made from the tables
    Docs(docs::Arguments),
    /// Play generated programs against the whole machine on KVM, and name the case of what is found
    FuzzVm(fuzz_vm::Arguments),
    /// Boot a guest that draws a picture on the paravirtual GPU, and write it to demo.png
    Demo(demo::Arguments),
    /// Draw with a stock Mesa in a Debian guest, beside the same drawn natively, and write both to linux-demo.png
    LinuxDemo(linux_demo::Arguments),
    /// Run the fuzz targets: what a guest may send, in front of the code that reads it
    Fuzz(fuzz::Arguments),
    /// Start and kill VMs, open and end sessions and draw for minutes, and tell what is left of them
    Soak(soak::Arguments),
    /// Run all tests: format, lints, unit and doc tests, end to end on KVM and in the testbed
    Test(test::Arguments),
    /// Boot a Debian guest under an unmodified QEMU whose GPU is a pvgpu-proxyd's, and check what it finds
    Qemu(qemu::Arguments),
    /// Send what `mini-vmm run --trace` recorded to a fresh GPU, and compare the results
    Replay(replay::Arguments),
    /// Print what `mini-vmm run --trace` recorded, a line per request
    Trace(trace::Arguments),
    /// Count the lines of unsafe code, which only become fewer
    Unsafe(unsafe_lines::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Coverage(arguments) => coverage::run(&arguments),
        Task::Testbed(arguments) => testbed::run(&arguments),
        Task::Docs(arguments) => docs::run(&arguments),
        Task::FuzzVm(arguments) => fuzz_vm::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::LinuxDemo(arguments) => linux_demo::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Soak(arguments) => soak::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Qemu(arguments) => qemu::run(&arguments),
        Task::Replay(arguments) => replay::run(&arguments),
        Task::Trace(arguments) => trace::run(&arguments),
        Task::Unsafe(arguments) => unsafe_lines::run(&arguments),
    }
}
