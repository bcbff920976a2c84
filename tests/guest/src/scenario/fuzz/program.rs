//! One fuzz case: a program of register accesses, writes to rings and tables, doorbells, flips of shared memory and requests,
//! generated and played at once. What the device answers has no influence on what comes next.

use virtio_drivers::PAGE_SIZE;

use super::arena::{AVAILABLE, Arena, PAGE, REQUESTS, RESPONSES, SIZE, TABLES, USED};
use super::random::Random;
use super::request;
use crate::physical::{Registers, SharedRange};

/// Queues of the device: two for requests, one for events.
const QUEUES: usize = 3;
/// Descriptors of a queue.
const QUEUE_SIZE: u64 = 128;
/// Most chains of a queue in a case.
const CHAINS_MAX: usize = 12;
/// Each request and each response has so many bytes.
const SLOT: u64 = 1024;

/// Registers of the transport (virtio 1.2, section 4.2.2).
mod register {
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
}

/// Descriptor flags (section 2.7.5).
mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// A case that is being played.
pub struct Program<'a> {
    pub registers: Registers,
    pub arena: &'a Arena,
    pub aperture: Option<&'a mut SharedRange>,
    pub random: Random,
    /// Hash of all that was played so far (FNV-1a), over all cases.
    pub fingerprint: &'a mut u64,
    /// Chains made available on each queue.
    pub available: [u16; QUEUES],
}

impl Program<'_> {
    /// Plays the case. The device is left as it is: whoever comes next resets it.
    pub fn play(mut self) {
        self.write(register::STATUS, 0);
        self.arena.clear();
        if self.random.percent(90) {
            self.initialize();
        }
        for queue in 0..QUEUES {
            self.fill(queue);
        }
        if self.random.percent(75) {
            self.write(register::QUEUE_NOTIFY, 0);
            self.pause();
        }
        for _ in 0..self.random.below(24) + 4 {
            self.step();
        }
    }

    fn note(&mut self, kind: u8, place: u64, value: u64) {
        let bytes = [place.to_le_bytes(), value.to_le_bytes()];
        for byte in [kind].iter().chain(bytes.as_flattened()) {
            *self.fingerprint =
                (*self.fingerprint ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        self.note(1, register, value.into());
        self.registers.write(register, value);
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) {
        for (place, bytes) in (offset..).step_by(8).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.note(2, place, u64::from_le_bytes(word));
        }
        self.arena.write(offset, bytes);
    }

    /// A register of initialization: nearly always what it should be.
    fn expected(&mut self, register: u64, value: u32) {
        match self.random.below(400) {
            0 => {}
            1 => {
                let value = self.random.word();
                self.write(register, value);
            }
            _ => self.write(register, value),
        }
    }

    /// The address of a part of the selected queue.
    fn place(&mut self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    /// Section 3.1.1, with a slip now and then.
    fn initialize(&mut self) {
        for status in [1, 3] {
            self.expected(register::STATUS, status);
        }
        // VERSION_1, with or without RING_EVENT_IDX and RING_INDIRECT_DESC.
        let features = self.random.one_of(&[0, 1 << 29, 1 << 28, 3 << 28]);
        for (half, value) in [features, 1].into_iter().enumerate() {
            self.expected(register::DRIVER_FEATURES_SEL, half as u32);
            self.expected(register::DRIVER_FEATURES, value);
        }
        self.expected(register::STATUS, 11);
        // A case without an event queue, or with one request queue, is a case too.
        for queue in 0..QUEUES {
            if queue > 0 && self.random.percent(60) {
                continue;
            }
            self.expected(register::QUEUE_SEL, queue as u32);
            self.set_up(queue as u64);
        }
        self.expected(register::STATUS, 15);
    }

    /// Places the selected queue.
    fn set_up(&mut self, queue: u64) {
        let size = match self.random.percent(99) {
            true => QUEUE_SIZE as u32,
            false => self.random.word(),
        };
        self.write(register::QUEUE_NUM, size);
        let strange = self.random.percent(2);
        let table = match strange {
            true => self.arena.table(&mut self.random),
            false => self.arena.at(TABLES + queue * PAGE),
        };
        self.place(register::QUEUE_DESC, table);
        let [driver, device] = match strange {
            true => [(); 2].map(|()| self.arena.address(&mut self.random) & !3),
            false => [AVAILABLE, USED].map(|area| self.arena.at(area + queue * PAGE)),
        };
        self.place(register::QUEUE_DRIVER, driver);
        self.place(register::QUEUE_DEVICE, device);
        self.expected(register::QUEUE_READY, 1);
    }

    /// Makes chains available: requests on the request queues, buffers on the event queue.
    fn fill(&mut self, queue: usize) {
        let chains = self.random.below(CHAINS_MAX) + 4;
        for _ in 0..chains {
            self.chain(queue);
        }
        self.make_available(queue);
    }

    fn descriptor(
        &mut self,
        table: u64,
        index: u64,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.store(table + index % 256 * 16, &bytes);
    }

    /// One chain, of two descriptors or of some more; not made available yet.
    fn chain(&mut self, queue: usize) {
        let number = u64::from(self.available[queue]);
        let table = TABLES + queue as u64 * PAGE;
        let place = (queue as u64 * 16 + number % 16) % 32;
        let (reads, writes) = (REQUESTS + place * SLOT, RESPONSES + place * SLOT);
        let request = match queue {
            2 => alloc::vec::Vec::new(),
            _ => request::generate(&mut self.random, number),
        };
        self.store(reads, &request);
        let length = request.len() as u32;
        // The first requests of a case are what all others need.
        let slot = SLOT as u32;
        let room = match number < 4 && self.random.percent(95) {
            true => slot,
            false => self
                .random
                .one_of(&[slot, slot, slot, 256, 64, 16, 15, 4 * slot]),
        };
        let head = number * 8 % QUEUE_SIZE;
        let (flags, indirect) = (flag::NEXT, self.random.percent(15));
        let (table, first) = match indirect {
            true => {
                let inner = TABLES + 3 * PAGE + head * 16;
                let address = self.arena.at(inner);
                let length = self.random.one_of(&[32, 32, 32, 48, 16, 0, 40, 0x1_0000]);
                self.descriptor(table, head, address, length, flag::INDIRECT, 0);
                (inner, 0)
            }
            false => (table, head),
        };
        let mut index = first;
        if !request.is_empty() {
            // Split in two now and then.
            let cut = match self.random.percent(20) {
                true => self.random.below(request.len()) as u32,
                false => length,
            };
            for (from, bytes) in [(0, cut), (cut, length - cut)] {
                if bytes > 0 {
                    let address = self.arena.at(reads + u64::from(from));
                    self.descriptor(table, index, address, bytes, flags, index as u16 + 1);
                    index += 1;
                }
            }
        }
        let address = self.arena.at(writes);
        self.descriptor(table, index, address, room, flag::WRITE, 0);
        if self.random.percent(3) {
            self.strange_descriptor(table, first + self.random.clone().next() % 3);
        }
        let entry = AVAILABLE + queue as u64 * PAGE + 4 + number % QUEUE_SIZE * 2;
        let head = match self.random.percent(97) {
            true => head as u16,
            false => self.random.word() as u16,
        };
        self.store(entry, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
    }

    fn strange_descriptor(&mut self, table: u64, index: u64) {
        let flags = self.random.next() as u16 & 7;
        let address = match flags & flag::INDIRECT != 0 {
            true => self.arena.table(&mut self.random),
            false => self.arena.address(&mut self.random),
        };
        let length = self.random.word();
        let next = self.random.word() as u16;
        self.descriptor(table, index, address, length, flags, next);
    }

    fn make_available(&mut self, queue: usize) {
        let index = match self.random.percent(98) {
            true => self.available[queue],
            false => self.random.word() as u16,
        };
        self.store(AVAILABLE + queue as u64 * PAGE + 2, &index.to_le_bytes());
    }

    /// Anything.
    fn step(&mut self) {
        let queue = self.random.below(QUEUES);
        match self.random.below(32) {
            0..10 => self.write(register::QUEUE_NOTIFY, queue as u32),
            10..14 => {
                self.chain(queue);
                self.make_available(queue);
            }
            14..20 => self.flip(),
            20 => self.any_register(),
            21 => {
                let offset = (self.random.next() % 0x120) & !3;
                self.note(3, offset, 0);
                self.registers.read(offset);
            }
            22 => self.narrow(),
            27..29 => self.pause(),
            23 => self.write(register::INTERRUPT_ACK, 3),
            24 => self.touch_aperture(),
            25 => {
                let index = self.random.next() % 64;
                self.strange_descriptor(TABLES + queue as u64 * PAGE, index);
            }
            26 if self.random.percent(20) => {
                // The device forgets everything and starts again.
                self.write(register::STATUS, 0);
                self.available = [0; QUEUES];
                self.initialize();
            }
            _ => {
                let value = match self.random.percent(90) {
                    true => queue as u32,
                    false => self.random.word(),
                };
                self.write(register::QUEUE_NOTIFY, value);
            }
        }
    }

    /// Lets the device work for a moment.
    fn pause(&mut self) {
        (0..self.random.below(1 << 16)).for_each(|_| core::hint::spin_loop());
    }

    /// Changes shared memory while the device may be reading it: a half-word of rings, tables or requests.
    fn flip(&mut self) {
        let place = match self.random.below(8) {
            // Flags and next of a descriptor, not its address: see `arena`.
            0..2 => {
                let index = self.random.next() % (4 * PAGE / 16);
                TABLES + index * 16 + self.random.one_of(&[8, 12, 14])
            }
            2..4 => AVAILABLE + self.random.next() % 3 * PAGE + self.random.next() % 32,
            4 => USED + self.random.next() % 3 * PAGE + self.random.next() % 32,
            // The lower half of a word of a request: see `Random::word`.
            _ => REQUESTS + self.random.next() % 32 * SLOT + self.random.next() % 32 * 4,
        };
        let value = match self.random.percent(50) {
            true => self.random.next() as u16 & 7,
            false => self.random.word() as u16,
        };
        self.store(place % (SIZE - 2), &value.to_le_bytes());
    }

    /// Writes any register, but gives the device no place to write to that is not the arena's.
    fn any_register(&mut self) {
        let offset = (self.random.next() % 0x120) & !3;
        let low = [
            register::QUEUE_DESC,
            register::QUEUE_DRIVER,
            register::QUEUE_DEVICE,
        ];
        if let Some(low) = low
            .into_iter()
            .find(|low| (*low..low + 8).contains(&offset))
        {
            let address = match low {
                register::QUEUE_DESC => self.arena.table(&mut self.random),
                _ => self.arena.address(&mut self.random),
            };
            self.place(low, address);
            return;
        }
        let value = self.random.word();
        self.write(offset, value);
    }

    /// An access that is not as wide as a register, or wider.
    fn narrow(&mut self) {
        let offset = self.random.next() % 0x120;
        let value = self.random.next();
        self.note(4, offset, value);
        let (byte, half) = (value as u8, value as u16);
        match self.random.below(3) {
            0 => self.registers.write_byte(offset, byte),
            1 => self.registers.write_half(offset & !1, half),
            // Reads as wide as two registers.
            _ => drop(self.registers.read_double(offset & !7)),
        }
    }

    /// Writes to the aperture, mapped or not.
    fn touch_aperture(&mut self) {
        let value = self.random.next();
        let page = self.random.next() % 16 * PAGE_SIZE as u64;
        self.note(5, page, value);
        if let Some(aperture) = &mut self.aperture {
            let mut word = [0; 8];
            aperture.read(page as usize, &mut word);
            aperture.write(page as usize, &value.to_le_bytes());
        }
    }
}
