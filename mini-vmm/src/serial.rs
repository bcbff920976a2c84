//! The serial port: a 16550 whose output goes to the console's sink and whose input comes from the
//! event loop.
//!
//! vCPU threads write and read its registers through `ports`; `events` feeds it. Output is passed on
//! byte by byte as the guest writes it. A sink that fails loses the guest's text and nothing else.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the guest's console goes to and comes from.
pub struct Console {
    /// Takes what the guest prints.
    pub output: Box<dyn Write + Send>,
    /// Where the guest's input is read from: a terminal, a pipe or a file.
    pub input: Option<File>,
    /// Whether Ctrl-A x in the input ends the machine (for a terminal in raw mode).
    pub escape: bool,
}

impl Console {
    /// A console that shows output and has no input.
    pub fn output(output: impl Write + Send + 'static) -> Self {
        Self {
            output: Box::new(output),
            input: None,
            escape: false,
        }
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("input", &self.input)
            .field("escape", &self.escape)
            .finish()
    }
}

/// Raises the port's interrupt line.
#[derive(Debug)]
pub struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Signals the event loop that the guest has read all input it was given.
#[derive(Debug)]
pub struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter means that the loop has not looked yet: it will.
        let _ = self.0.write(1);
    }
}

type Registers = Serial<Line, Drained, Box<dyn Write + Send>>;

/// The port. Clones are the same port.
#[derive(Clone)]
pub struct Port {
    registers: Arc<Mutex<Registers>>,
    interrupt: Arc<EventFd>,
    drained: Arc<EventFd>,
}

impl Port {
    /// A port that prints to `output`.
    ///
    /// # Errors
    ///
    /// When the host has no file descriptor left for its events.
    pub fn new(output: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let drained = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let registers = Serial::with_events(
            Line(Arc::clone(&interrupt)),
            Drained(Arc::clone(&drained)),
            output,
        );
        Ok(Self {
            registers: Arc::new(Mutex::new(registers)),
            interrupt,
            drained,
        })
    }

    /// The event that must raise the port's interrupt line.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// The event that tells that the guest has read all of its input.
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    fn registers(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wrote `value` to register `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        // A full sink or interrupt event is not the guest's business, and saying so per byte would
        // let a guest flood the log.
        let _ = self.registers().write(offset, value);
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&self, offset: u8) -> u8 {
        self.registers().read(offset)
    }

    /// How many bytes of input the port can take now.
    pub fn room(&self) -> usize {
        self.registers().fifo_capacity()
    }

    /// Gives the guest input; bytes beyond [`Port::room`] are lost, as on the real thing.
    pub fn feed(&self, bytes: &[u8]) {
        let _ = self.registers().enqueue_raw_bytes(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_reaches_the_sink_byte_by_byte() {
        let sink = Sink::default();
        let port = Port::new(Box::new(sink.clone())).unwrap();
        for byte in b"hi\n" {
            port.write(0, *byte);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hi\n");
    }

    #[test]
    fn reading_the_last_byte_of_input_tells_the_event_loop() {
        let port = Port::new(Box::new(io::sink())).unwrap();
        let room = port.room();
        port.feed(b"ab");
        assert_eq!(port.room(), room - 2);
        assert_eq!(port.read(0), b'a');
        assert!(port.drained().read().is_err(), "one byte is left");
        assert_eq!(port.read(0), b'b');
        assert_eq!(port.drained().read().unwrap(), 1);
        assert_eq!(port.room(), room);
    }

    #[test]
    fn a_broken_sink_does_not_break_the_port() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let port = Port::new(Box::new(Broken)).unwrap();
        port.write(0, b'x');
        assert_eq!(
            port.read(5) & 0x20,
            0x20,
            "the transmitter reports itself empty"
        );
    }
}
