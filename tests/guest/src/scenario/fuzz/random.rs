//! The generator of all that a fuzz case does: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
//! generators", OOPSLA 2014; the constants are those of Vigna's reference). The same seed gives the same case on every
//! machine; nothing that a device answers may ever go in.

/// A sequence of numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of a case: cases of one seed have nothing in common.
    pub fn of_case(seed: u64, case: u32) -> Self {
        let mut mixed = Self(seed);
        let start = mixed.next() ^ u64::from(case).wrapping_mul(0xd134_2543_de82_ef95);
        Self(start)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 32) as usize) % end
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// True in so many of a hundred times.
    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    /// A 32-bit number that is likely to mean something. As an address it is never one of the guest's own program or heap:
    /// it is below 1 MiB, or above all RAM.
    pub fn word(&mut self) -> u32 {
        let random = self.next();
        match self.below(10) {
            0..4 => (random % 5) as u32,
            4 => (random % 0x100) as u32,
            5 => self.one_of(&[0x1000, 0x2000, 0xffff, 0x1_0000, 0x8000, 4095, 4097]),
            6 => self.one_of(&[u32::MAX, 1 << 31, i32::MAX as u32, u32::MAX - 15]),
            _ => random as u32 | 0x1000_0000,
        }
    }
}
