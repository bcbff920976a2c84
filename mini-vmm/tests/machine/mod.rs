//! Runs a machine with a hand-made kernel and a time limit; used by the tests that need KVM.

#![allow(dead_code)]

use std::io::{self, Write};
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

/// Ends a machine that takes too long, so that a failing test fails instead of hanging.
pub fn run(vm: Vm) -> Outcome {
    let stop = vm.stop();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(20))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            stop.end(Ending::Failure {
                cause: "the test's time is over".into(),
            });
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
