//! Runs a machine with a hand-made kernel and a time limit; used by the tests that need KVM.

#![allow(dead_code)]

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::kernels::TempFile;
use pvgpu_mini_vmm::{Console, Ending, Outcome, Vm, VmConfig};

/// Collects what a guest prints.
#[derive(Clone, Default)]
pub struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    /// Everything so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// Runs the machine, but not for ever: it is stopped after a while, and the whole test process when even
/// that does not end it.
pub fn run(vm: Vm) -> Outcome {
    let stop = vm.stop();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let in_time = |watch: &Receiver<()>| {
        watch.recv_timeout(Duration::from_secs(20)) == Err(RecvTimeoutError::Disconnected)
    };
    let watchdog = std::thread::spawn(move || {
        if !in_time(&watch) {
            stop.end(Ending::Failure {
                cause: "the test's time is over".into(),
            });
            if !in_time(&watch) {
                eprintln!("a machine cannot be stopped: a vCPU or the device is stuck");
                std::process::abort();
            }
        }
    });
    let outcome = vm.run().unwrap();
    drop(done);
    watchdog.join().unwrap();
    outcome
}

/// Boots `kernel` with `change` made to a plain machine; returns the outcome and what was printed.
pub fn boot(kernel: &[u8], change: impl FnOnce(&mut VmConfig)) -> (Outcome, String) {
    let file = TempFile::new(kernel);
    let screen = Screen::default();
    let mut config = VmConfig::new(file.path());
    config.memory = 32 << 20;
    config.console = Console::output(screen.clone());
    change(&mut config);
    let outcome = run(Vm::new(config).unwrap());
    (outcome, screen.text())
}
