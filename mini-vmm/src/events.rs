//! The event loop: one thread that waits for the machine's end and for console input, and looks after the aperture.
//!
//! `vm` runs it on the thread that called it. It must never wait for a device or a vCPU.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use pvgpu_host_proxy::aperture::Reservation;

use crate::serial::Port;
use crate::stop::{Ending, Stop};

/// How often the memory behind the aperture is checked: a vCPU that touches what is lost stands still until then.
/// In milliseconds.
const CHECK_PERIOD: u16 = 1000;

/// Runs until the machine is stopped, feeding `input` to the serial port.
///
/// # Errors
///
/// When the host refuses epoll.
pub fn run(
    stop: &Stop,
    port: &Port,
    input: Option<(File, bool)>,
    aperture: Option<&Reservation>,
) -> Result<(), event_manager::Error> {
    let mut events: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new()?;
    events.add_subscriber(Box::new(Watch { stop: stop.clone() }));
    if let Some((file, escape)) = input {
        let escape = escape.then(Escape::default);
        events.add_subscriber(Box::new(Input {
            file,
            port: port.clone(),
            stop: stop.clone(),
            escape,
            state: Readiness::Waiting,
        }));
    }
    let Some(aperture) = aperture else {
        while !stop.stopped() {
            events.run()?;
        }
        return Ok(());
    };
    let mut checked = Instant::now();
    while !stop.stopped() {
        events.run_with_timeout(CHECK_PERIOD.into())?;
        if checked.elapsed() >= Duration::from_millis(CHECK_PERIOD.into()) {
            aperture.replace_lost();
            checked = Instant::now();
        }
    }
    Ok(())
}

/// Wakes the loop when the machine ends.
struct Watch {
    stop: Stop,
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.stop.event(), EventSet::IN)) {
            let cause = format!("the event loop cannot watch the machine: {error}");
            self.stop.end(Ending::Failure { cause });
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

/// What the loop does with the input file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readiness {
    /// epoll watches it.
    Waiting,
    /// The serial port is full: wait until the guest has read.
    Full,
    /// A regular file, which epoll refuses: it is always ready.
    Always,
    /// It has ended.
    Ended,
}

/// Feeds a file, pipe or terminal to the serial port, as much at a time as the port has room for.
struct Input {
    file: File,
    port: Port,
    stop: Stop,
    escape: Option<Escape>,
    state: Readiness,
}

impl Input {
    fn events(&self) -> Events {
        Events::new(&self.file, EventSet::IN)
    }

    /// Reads as much as the port has room for and passes it on.
    fn transfer(&mut self, ops: &mut EventOps) {
        let room = self.port.room();
        if room == 0 {
            if self.state == Readiness::Waiting {
                let _ = ops.remove(self.events());
                self.state = Readiness::Full;
            }
            return;
        }
        let mut bytes = vec![0; room];
        match self.file.read(&mut bytes) {
            Ok(count) if count > 0 => {
                bytes.truncate(count);
                if let Some(escape) = &mut self.escape
                    && escape.filter(&mut bytes)
                {
                    self.stop.end(Ending::Stopped { signal: None });
                }
                self.port.feed(&bytes);
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            // The end of the file, or of the terminal behind it.
            _ => {
                if self.state == Readiness::Waiting {
                    let _ = ops.remove(self.events());
                }
                self.state = Readiness::Ended;
            }
        }
    }

    fn drained(&self) -> RawFd {
        self.port.drained().as_raw_fd()
    }
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.port.drained(), EventSet::IN)) {
            log::warn!("the console has no input: {error}");
            return;
        }
        if ops.add(self.events()).is_err() {
            self.state = Readiness::Always;
            self.transfer(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() != self.drained() {
            self.transfer(ops);
            return;
        }
        let _ = self.port.drained().read();
        match self.state {
            Readiness::Full => {
                self.state = Readiness::Waiting;
                if ops.add(self.events()).is_err() {
                    self.state = Readiness::Ended;
                }
            }
            Readiness::Always => self.transfer(ops),
            Readiness::Waiting | Readiness::Ended => {}
        }
    }
}

/// The way out of a terminal in raw mode: Ctrl-A x ends the machine, Ctrl-A Ctrl-A is one Ctrl-A.
#[derive(Debug, Default)]
struct Escape {
    seen: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    /// Takes escape sequences out of `bytes`; true when one of them ends the machine.
    fn filter(&mut self, bytes: &mut Vec<u8>) -> bool {
        let mut end = false;
        bytes.retain(|byte| {
            let escaped = std::mem::replace(&mut self.seen, false);
            match byte {
                b'x' if escaped => {
                    end = true;
                    false
                }
                &CTRL_A if !escaped => {
                    self.seen = true;
                    false
                }
                _ => true,
            }
        });
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn ctrl_a_x_ends_the_machine_even_when_split_over_two_reads() {
        let mut escape = Escape::default();
        let mut bytes = b"ab\x01".to_vec();
        assert!(!escape.filter(&mut bytes));
        assert_eq!(bytes, b"ab");
        let mut bytes = b"xc".to_vec();
        assert!(escape.filter(&mut bytes));
        assert_eq!(bytes, b"c");
        let mut bytes = b"\x01\x01x".to_vec();
        assert!(!escape.filter(&mut bytes));
        assert_eq!(bytes, b"\x01x");
    }

    /// Reads `count` bytes as a polling guest would.
    fn guest_reads(port: &Port, count: usize) -> Vec<u8> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut bytes = Vec::new();
        while bytes.len() < count {
            assert!(
                std::time::Instant::now() < deadline,
                "input stalled after {} bytes",
                bytes.len()
            );
            // Line status: data ready.
            if port.read(5) & 1 != 0 {
                bytes.push(port.read(0));
            } else {
                std::thread::yield_now();
            }
        }
        bytes
    }

    fn feeds_all(file: File, write: impl FnOnce() + Send + 'static, expected: &[u8]) {
        let stop = Stop::new().unwrap();
        let port = Port::new(Box::new(std::io::sink())).unwrap();
        let events = {
            let (stop, port) = (stop.clone(), port.clone());
            std::thread::spawn(move || run(&stop, &port, Some((file, false)), None))
        };
        let writer = std::thread::spawn(write);
        assert_eq!(guest_reads(&port, expected.len()), expected);
        writer.join().unwrap();
        stop.end(Ending::Reset);
        events.join().unwrap().unwrap();
    }

    #[test]
    fn input_longer_than_the_ports_buffer_arrives_complete_from_a_pipe() {
        let text: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
        let (read, mut write) = std::io::pipe().unwrap();
        let sent = text.clone();
        feeds_all(
            File::from(std::os::fd::OwnedFd::from(read)),
            move || write.write_all(&sent).unwrap(),
            &text,
        );
    }

    #[test]
    fn input_longer_than_the_ports_buffer_arrives_complete_from_a_file() {
        let text: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
        let path = std::env::temp_dir().join(format!("mini-vmm-input-{}", std::process::id()));
        std::fs::write(&path, &text).unwrap();
        feeds_all(File::open(&path).unwrap(), || (), &text);
        std::fs::remove_file(path).unwrap();
    }
}
