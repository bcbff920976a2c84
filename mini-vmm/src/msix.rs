//! MSI-X: the table in which a driver says which message each vector sends, masks, and what waits behind them. PCI Local Bus 3.0,
//! section 6.8.2.
//!
//! Each vector is an event that KVM turns into its message, so any thread or process can interrupt the guest; what the message is,
//! KVM is told before a vector is used for the first time and after a change. A masked vector is taken away from KVM
//! ([`Sender`]): what is signalled meanwhile stays in the event, and is pending. `virtio_pci` shows the guest the table.

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

/// What sends messages: KVM.
pub trait Sender: Send + Sync {
    /// From here on, these are the messages of all vectors; those without one do nothing.
    fn route(&self, messages: &[Option<Message>]);
    /// From here on, that vector's event sends its message, also for what was signalled before; or it does not, and keeps
    /// what is signalled.
    fn connect(&self, vector: usize, event: &EventFd, connected: bool);
}

/// The vectors of a function.
pub struct Msix {
    state: Mutex<State>,
    events: Vec<EventFd>,
    sender: Arc<dyn Sender>,
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
    connected: bool,
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
    /// A vector for each of `events`, all of them masked. Nobody must wait to read them.
    pub fn new(events: Vec<EventFd>, sender: Arc<dyn Sender>) -> Self {
        let vector = Vector {
            words: [0, 0, 0, Vector::MASKED],
            connected: false,
        };
        Self {
            state: Mutex::new(State {
                enabled: false,
                masked: false,
                vectors: vec![vector; events.len()],
                routed: vec![None; events.len()],
            }),
            events,
            sender,
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
        self.update(&mut state);
    }

    /// Interrupts the guest by a vector: at once, or as soon as it is no longer masked.
    pub fn signal(&self, vector: u16) {
        if self.enabled()
            && let Some(event) = self.event(vector)
        {
            // A full counter is an interrupt that is pending already.
            let _ = event.write(1);
        }
    }

    /// What interrupts the guest by that vector when it is signalled, as [`Msix::signal`] does.
    pub fn event(&self, vector: u16) -> Option<&EventFd> {
        self.events.get(usize::from(vector))
    }

    /// Forgets what waits behind masks.
    pub fn forget(&self) {
        let state = self.state();
        for (vector, event) in state.vectors.iter().zip(&self.events) {
            if !vector.connected {
                let _ = event.read();
            }
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
        self.update(&mut state);
    }

    /// Reads the bits of the vectors that wait.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        let vectors = state.vectors.iter().zip(&self.events);
        let mut pending = vectors
            .skip(first.saturating_mul(8))
            .map(|(vector, event)| {
                // What is read is put back.
                !vector.connected && event.read().is_ok_and(|count| event.write(count).is_ok())
            });
        for byte in data {
            for bit in 0..8 {
                *byte |= u8::from(pending.next().unwrap_or(false)) << bit;
            }
        }
    }

    /// Takes away from KVM what is masked now, and gives it what is not any more, after it has been told what that sends.
    fn update(&self, state: &mut State) {
        let open = state.enabled && !state.masked;
        let mut changed = false;
        for (vector, routed) in state.vectors.iter().zip(&mut state.routed) {
            if open && !vector.masked() && *routed != Some(vector.message()) {
                *routed = Some(vector.message());
                changed = true;
            }
        }
        if changed {
            self.sender.route(&state.routed);
        }
        for (index, (vector, event)) in state.vectors.iter_mut().zip(&self.events).enumerate() {
            let connected = open && !vector.masked();
            if std::mem::replace(&mut vector.connected, connected) != connected {
                self.sender.connect(index, event, connected);
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
    use std::collections::BTreeSet;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    /// What KVM has been told.
    #[derive(Default)]
    struct Kvm {
        routes: Mutex<Vec<Vec<Option<Message>>>>,
        connected: Mutex<BTreeSet<usize>>,
    }

    impl Sender for Kvm {
        fn route(&self, messages: &[Option<Message>]) {
            self.routes.lock().unwrap().push(messages.to_vec());
        }

        fn connect(&self, vector: usize, _event: &EventFd, connected: bool) {
            let mut all = self.connected.lock().unwrap();
            let changed = match connected {
                true => all.insert(vector),
                false => all.remove(&vector),
            };
            assert!(changed, "{vector} {connected}");
        }
    }

    struct Guest {
        kvm: Arc<Kvm>,
        msix: Msix,
    }

    impl Guest {
        fn new(vectors: usize) -> Self {
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let events = std::iter::repeat_with(event).take(vectors).collect();
            let kvm = Arc::<Kvm>::default();
            let msix = Msix::new(events, Arc::clone(&kvm) as _);
            Self { kvm, msix }
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

        /// Whether KVM has been signalled by that vector since the last question.
        fn signals(&self, vector: u16) -> bool {
            let connected = self.kvm.connected.lock().unwrap();
            match connected.contains(&vector.into()) {
                true => self.msix.event(vector).unwrap().read().is_ok(),
                false => false,
            }
        }

        fn routes(&self) -> Vec<Vec<Option<Message>>> {
            self.kvm.routes.lock().unwrap().clone()
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
        assert!(!guest.signals(1), "not enabled");
        assert!(guest.routes().is_empty());
        guest.msix.control(true, false);
        let routes = [None, Some(MESSAGE), None];
        assert_eq!(guest.routes(), [routes]);
        guest.msix.signal(1);
        guest.msix.signal(2);
        guest.msix.signal(3);
        guest.msix.signal(u16::MAX);
        let signals = [0, 1, 2].map(|vector| guest.signals(vector));
        assert_eq!(signals, [false, true, false]);
        assert_eq!(guest.routes().len(), 1, "nothing has changed");
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
        let signals = || [0, 1].map(|vector| guest.signals(vector));
        assert_eq!(signals(), [false, false]);
        guest.msix.control(true, false);
        assert_eq!(guest.pending(), 0b10);
        assert_eq!(signals(), [true, false]);
        guest.set_up(1, false);
        assert_eq!(guest.pending(), 0);
        assert_eq!(signals(), [false, true]);
        guest.set_up(1, true);
        // As another process does it.
        guest.msix.event(1).unwrap().write(1).unwrap();
        assert_eq!(guest.pending(), 0b10);
        guest.msix.forget();
        guest.set_up(1, false);
        assert!(!guest.signals(1), "forgotten");
    }

    #[test]
    fn kvm_hears_of_a_change_when_the_vector_is_unmasked() {
        let guest = Guest::new(2);
        guest.msix.control(true, false);
        guest.set_up(1, false);
        let told = guest.routes().len();
        guest.write(ENTRY + 12, 1);
        guest.write(ENTRY, 0xfee0_1000);
        assert_eq!(guest.routes().len(), told);
        guest.write(ENTRY + 12, 0);
        let address = 0xfee0_1000;
        let last = guest.routes().last().unwrap()[1];
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
