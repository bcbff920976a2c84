//! MSI-X: the table in which a driver says which message each vector sends, masks, and what waits behind them. PCI Local Bus 3.0,
//! section 6.8.2.
//!
//! Each vector is an event that KVM turns into its message, so any thread can interrupt the guest; what the message is,
//! KVM is told ([`Route`]) before a vector is used for the first time and after a change. `virtio_pci` shows the guest the table.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Bytes of an entry of the table: address, data, and a word whose lowest bit is the mask.
pub const ENTRY: u64 = 16;

/// A memory write that is an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where it goes.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Tells KVM the messages of all vectors; those without one do nothing.
pub type Route = Box<dyn Fn(&[Option<Message>]) + Send + Sync>;

/// The vectors of a function.
pub struct Msix {
    state: Mutex<State>,
    events: Vec<Arc<EventFd>>,
    route: Route,
}

struct State {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
    /// What KVM was told.
    routed: Vec<Option<Message>>,
}

#[derive(Clone, Copy)]
struct Vector {
    /// The entry as the guest has written it.
    words: [u32; 4],
    pending: bool,
}

impl Vector {
    const MASKED: u32 = 1;

    fn message(&self) -> Message {
        let [low, high, data, _] = self.words;
        Message {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }

    fn masked(&self) -> bool {
        let [.., control] = self.words;
        control & Self::MASKED != 0
    }
}

impl Msix {
    /// A vector for each of `events`, all of them masked.
    pub fn new(events: Vec<Arc<EventFd>>, route: Route) -> Self {
        let vector = Vector {
            words: [0, 0, 0, Vector::MASKED],
            pending: false,
        };
        Self {
            state: Mutex::new(State {
                enabled: false,
                masked: false,
                vectors: vec![vector; events.len()],
                routed: vec![None; events.len()],
            }),
            events,
            route,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.events.len()
    }

    /// Whether the driver has enabled MSI-X.
    pub fn enabled(&self) -> bool {
        self.state().enabled
    }

    /// The driver switches MSI-X on or off, and masks all vectors or none beside those that are masked anyway.
    pub fn control(&self, enabled: bool, masked: bool) {
        let mut state = self.state();
        state.enabled = enabled;
        state.masked = masked;
        self.deliver(&mut state);
    }

    /// Interrupts the guest by a vector: at once, or as soon as it is no longer masked.
    pub fn signal(&self, vector: u16) {
        let mut state = self.state();
        if state.enabled
            && let Some(vector) = state.vectors.get_mut(usize::from(vector))
        {
            vector.pending = true;
            self.deliver(&mut state);
        }
    }

    /// Forgets what waits behind masks.
    pub fn forget(&self) {
        for vector in &mut self.state().vectors {
            vector.pending = false;
        }
    }

    /// Reads the table: whole words.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        for (word, place) in data.chunks_exact_mut(4).zip((0..).step_by(4)) {
            if let Some(value) = find(offset.wrapping_add(place))
                .and_then(|(vector, index)| state.vectors.get(vector)?.words.get(index).copied())
            {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table: whole words.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let (words, _) = data.as_chunks();
        for (word, place) in words.iter().zip((0..).step_by(4)) {
            if let Some(value) = find(offset.wrapping_add(place))
                .and_then(|(vector, index)| state.vectors.get_mut(vector)?.words.get_mut(index))
            {
                *value = u32::from_le_bytes(*word);
            }
        }
        self.deliver(&mut state);
    }

    /// Reads the bits of the vectors that wait.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = state.vectors.chunks(8).skip(first);
        for (byte, vectors) in data.iter_mut().zip(bytes) {
            *byte = (vectors.iter().rev()).fold(0, |bits, v| bits << 1 | u8::from(v.pending));
        }
    }

    /// Sends what waits and is not masked any more, after KVM has been told what that is.
    fn deliver(&self, state: &mut State) {
        if !state.enabled || state.masked {
            return;
        }
        let mut changed = false;
        for (vector, routed) in state.vectors.iter().zip(&mut state.routed) {
            if !vector.masked() && *routed != Some(vector.message()) {
                *routed = Some(vector.message());
                changed = true;
            }
        }
        if changed {
            (self.route)(&state.routed);
        }
        for (vector, event) in state.vectors.iter_mut().zip(&self.events) {
            if vector.pending && !vector.masked() {
                vector.pending = false;
                // A full counter is an interrupt that is pending already.
                let _ = event.write(1);
            }
        }
    }
}

/// The vector and the word of its entry at that offset of the table.
fn find(offset: u64) -> Option<(usize, usize)> {
    let aligned = offset.is_multiple_of(4);
    let vector = usize::try_from(offset / ENTRY).ok()?;
    let word = usize::try_from(offset % ENTRY / 4).ok()?;
    aligned.then_some((vector, word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    struct Guest {
        events: Vec<Arc<EventFd>>,
        routes: Arc<Mutex<Vec<Vec<Option<Message>>>>>,
        msix: Msix,
    }

    impl Guest {
        fn new(vectors: usize) -> Self {
            let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let events: Vec<_> = std::iter::repeat_with(event).take(vectors).collect();
            let routes = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&routes);
            let route = move |messages: &[_]| told.lock().unwrap().push(messages.to_vec());
            let msix = Msix::new(events.clone(), Box::new(route));
            Self {
                events,
                routes,
                msix,
            }
        }

        fn write(&self, offset: u64, value: u32) {
            self.msix.write_table(offset, &value.to_le_bytes());
        }

        fn set_up(&self, vector: u64, masked: bool) {
            self.write(vector * ENTRY, 0xfee0_0000);
            self.write(vector * ENTRY + 4, 0);
            self.write(vector * ENTRY + 8, 0x40 + u32::try_from(vector).unwrap());
            self.write(vector * ENTRY + 12, masked.into());
        }

        fn pending(&self) -> u8 {
            let mut bits = [0];
            self.msix.read_pending(0, &mut bits);
            bits[0]
        }

        /// How often a vector was signalled since the last question.
        fn signals(&self, vector: usize) -> u64 {
            self.events[vector].read().unwrap_or(0)
        }
    }

    const MESSAGE: Message = Message {
        address: 0xfee0_0000,
        data: 0x41,
    };

    #[test]
    fn a_vector_sends_its_message_once_kvm_knows_it() {
        let guest = Guest::new(3);
        guest.set_up(1, false);
        guest.msix.signal(1);
        assert_eq!(guest.signals(1), 0, "not enabled");
        assert!(guest.routes.lock().unwrap().is_empty());
        guest.msix.control(true, false);
        let routes = [None, Some(MESSAGE), None];
        assert_eq!(*guest.routes.lock().unwrap(), [routes]);
        guest.msix.signal(1);
        guest.msix.signal(2);
        guest.msix.signal(3);
        guest.msix.signal(u16::MAX);
        assert_eq!([0, 1, 2].map(|vector| guest.signals(vector)), [0, 1, 0]);
        assert_eq!(guest.routes.lock().unwrap().len(), 1, "nothing has changed");
    }

    #[test]
    fn what_is_masked_waits_and_is_sent_once() {
        let guest = Guest::new(3);
        guest.msix.control(true, true);
        guest.set_up(0, false);
        guest.set_up(1, true);
        for vector in [0, 1, 1] {
            guest.msix.signal(vector);
        }
        assert_eq!(guest.pending(), 0b11);
        assert_eq!([0, 1].map(|vector| guest.signals(vector)), [0, 0]);
        guest.msix.control(true, false);
        assert_eq!(guest.pending(), 0b10);
        assert_eq!([0, 1].map(|vector| guest.signals(vector)), [1, 0]);
        guest.set_up(1, false);
        assert_eq!(guest.pending(), 0);
        assert_eq!([0, 1].map(|vector| guest.signals(vector)), [0, 1]);
        guest.set_up(1, true);
        guest.msix.signal(1);
        guest.msix.forget();
        guest.set_up(1, false);
        assert_eq!(guest.signals(1), 0, "forgotten");
    }

    #[test]
    fn kvm_hears_of_a_change_when_the_vector_is_unmasked() {
        let guest = Guest::new(2);
        guest.msix.control(true, false);
        guest.set_up(1, false);
        let told = guest.routes.lock().unwrap().len();
        guest.write(ENTRY + 12, 1);
        guest.write(ENTRY, 0xfee0_1000);
        assert_eq!(guest.routes.lock().unwrap().len(), told);
        guest.write(ENTRY + 12, 0);
        let address = 0xfee0_1000;
        let last = guest.routes.lock().unwrap().last().unwrap()[1];
        assert_eq!(last, Some(Message { address, ..MESSAGE }));
    }

    #[test]
    fn the_table_keeps_what_is_written_in_words_and_nothing_else() {
        let guest = Guest::new(2);
        let mut entry = [0; 8];
        guest.msix.read_table(ENTRY + 8, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0], "masked at first");
        guest.msix.write_table(ENTRY, &[1, 2, 3, 4, 5, 6, 7, 8]);
        guest.msix.read_table(ENTRY, &mut entry);
        assert_eq!(entry, [1, 2, 3, 4, 5, 6, 7, 8]);
        for offset in (0..3 * ENTRY).chain([u64::MAX - 3, u64::MAX]) {
            for length in 0..8 {
                if offset % 4 != 0 || length < 4 || offset >= 2 * ENTRY {
                    guest.msix.write_table(offset, &[0xff; 8][..length]);
                }
                guest.msix.read_table(offset, &mut [0; 8][..length]);
                guest.msix.read_pending(offset, &mut [0; 8][..length]);
            }
        }
        guest.msix.read_table(ENTRY, &mut entry);
        assert_eq!(entry, [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
