//! Answers that cannot change, kept so that the host need be asked only once ([`Answer::Constant`]).
//!
//! A [`Session`] looks here before it sends a question, and adds what the host answers. All sessions of one connection may
//! share a table: they use it at the same time, and none waits for another. It answers nothing but the very bytes that
//! were asked before, so that what one caller asks cannot change what another is told; and nothing at all once the host
//! driver says that its device is gone.
//!
//! [`Answer::Constant`]: pvgpu_protocol::schema::Answer::Constant
//! [`Session`]: crate::session::Session

#[cfg(not(loom))]
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use pvgpu_protocol::Errno;

/// Room for entries, in words of 8 bytes. A driver's parameters take 6 to 8 words each and a capset of virgl 360, for
/// each size that callers ask it in; the whole table stays below 32 KiB, which a kernel has in one piece.
#[cfg(not(loom))]
const WORDS: usize = 4000;
/// Two entries with a word each way: loom remembers every access of every word.
#[cfg(loom)]
const WORDS: usize = 8;
/// Words of an entry before its question: the [`heading`], then the answer's length in bytes.
const HEADER: usize = 2;

/// The table. Memory full of zeros is an empty one.
#[derive(Debug)]
pub struct Constants {
    /// Entries, one after the other: header, question, answer, each from a new word on. An entry never changes and never
    /// goes, so what lies before `used` may be read at any time.
    words: [AtomicU64; WORDS],
    /// How many words are entries.
    used: AtomicUsize,
    /// Whether somebody holds the [`Draft`].
    drafting: AtomicBool,
    /// Whether the host driver's last word was that its device is gone.
    gone: AtomicBool,
}

/// A question that is being asked, and will be an entry when its answer is there. There is one at a time.
#[derive(Debug)]
#[must_use = "without an answer it is no entry"]
pub struct Draft<'a> {
    constants: &'a Constants,
    /// Where the entry starts.
    start: usize,
    /// Where its answer starts.
    answer: usize,
}

/// Words that so many bytes take.
const fn words(bytes: usize) -> usize {
    bytes.div_ceil(8)
}

/// What tells questions of different commands and lengths apart.
const fn heading(command: u32, question: usize) -> u64 {
    ((question as u64) << 32) | command as u64
}

/// Up to 8 bytes as a word.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(word)
}

impl Constants {
    /// An empty table.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self {
            words: [const { AtomicU64::new(0) }; WORDS],
            used: AtomicUsize::new(0),
            drafting: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        }
    }

    /// An empty table whose accesses loom sees.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
            used: AtomicUsize::new(0),
            drafting: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        }
    }

    /// Takes note of how the host answered an ioctl: after `ENODEV` there are no answers here, until it answers
    /// something else.
    pub fn heard(&self, result: Result<i32, Errno>) {
        let gone = result == Err(Errno::ENODEV);
        if self.gone.load(Ordering::Relaxed) != gone {
            self.gone.store(gone, Ordering::Relaxed);
        }
    }

    /// Whether the host driver's last word was that its device is gone.
    pub fn device_is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Replaces the question in the first `question` bytes of `buffer` by its answer and returns that one's length; `None`
    /// when it is not known, or does not fit.
    pub fn answer(&self, command: u32, buffer: &mut [u8], question: usize) -> Option<usize> {
        let (start, length) = self.find(command, buffer.get(..question)?)?;
        let target = buffer.get_mut(..length)?;
        for (bytes, at) in target.chunks_mut(8).zip(start..) {
            let word = self.load(at).to_le_bytes();
            bytes.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        }
        Some(length)
    }

    /// Notes a question that is about to be asked; `None` when it is known by now, when there is no room for it, or while
    /// another one is being asked.
    pub fn draft(&self, command: u32, question: &[u8]) -> Option<Draft<'_>> {
        if self.drafting.swap(true, Ordering::Acquire) {
            return None;
        }
        let start = self.used.load(Ordering::Relaxed);
        let draft = Draft {
            constants: self,
            start,
            answer: start + HEADER + words(question.len()),
        };
        if draft.answer > WORDS || self.find(command, question).is_some() {
            return None;
        }
        self.store(start, heading(command, question.len()));
        self.store_bytes(start + HEADER, question);
        Some(draft)
    }

    /// Where the answer to a question starts, and its length in bytes.
    fn find(&self, command: u32, question: &[u8]) -> Option<(usize, usize)> {
        if self.device_is_gone() {
            return None;
        }
        let heading = heading(command, question.len());
        // Pairs with the store in `Draft::complete`: the words before it are those of whole entries.
        let end = self.used.load(Ordering::Acquire);
        let mut start = 0;
        while start < end {
            let found = self.load(start);
            let length = usize::try_from(self.load(start + 1)).ok()?;
            let asked = usize::try_from(found >> 32).ok()?;
            let answer = start + HEADER + words(asked);
            let mut asked = question.chunks(8).zip(start + HEADER..);
            if found == heading && asked.all(|(bytes, at)| self.load(at) == word(bytes)) {
                return Some((answer, length));
            }
            start = answer + words(length);
        }
        None
    }

    fn load(&self, at: usize) -> u64 {
        self.words
            .get(at)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.words.get(at) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn store_bytes(&self, start: usize, bytes: &[u8]) {
        for (bytes, at) in bytes.chunks(8).zip(start..) {
            self.store(at, word(bytes));
        }
    }
}

impl Default for Constants {
    fn default() -> Self {
        Self::new()
    }
}

impl Draft<'_> {
    /// Makes it an entry with that answer, if there is room for it.
    pub fn complete(self, answer: &[u8]) {
        let end = self.answer + words(answer.len());
        if end > WORDS {
            return;
        }
        self.constants.store(self.start + 1, answer.len() as u64);
        self.constants.store_bytes(self.answer, answer);
        self.constants.used.store(end, Ordering::Release);
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        self.constants.drafting.store(false, Ordering::Release);
    }
}

/// Each of these runs in all orders in which threads can see each other's stores (`cargo xtask test --only loom`).
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Whether the table took an entry of one word that says `answer` to `question`.
    fn learn(constants: &Constants, question: u8, answer: u8) -> bool {
        let draft = constants.draft(1, &[question; 8]);
        draft.map(|draft| draft.complete(&[answer; 8])).is_some()
    }

    fn ask(constants: &Constants, question: u8) -> Option<[u8; 8]> {
        let mut buffer = [question; 8];
        let length = constants.answer(1, &mut buffer, 8)?;
        assert_eq!(length, 8);
        Some(buffer)
    }

    // In these two the reader is the thread that starts later. Loom begins with an order in which it is also the last, and
    // finds the others from there; from an order in which it is the first, it would find none.

    #[test]
    fn who_finds_a_question_finds_the_whole_answer() {
        loom::model(|| {
            let constants = Arc::new(Constants::new());
            let reader = Arc::clone(&constants);
            let reader = thread::spawn(move || ask(&reader, 1));
            assert!(learn(&constants, 1, 0xaa));
            if let Some(answer) = reader.join().unwrap() {
                assert_eq!(answer, [0xaa; 8]);
            }
            assert_eq!(ask(&constants, 1), Some([0xaa; 8]));
        });
    }

    #[test]
    fn an_entry_stays_readable_while_the_next_one_comes() {
        loom::model(|| {
            let constants = Arc::new(Constants::new());
            assert!(learn(&constants, 1, 0xaa));
            let reader = Arc::clone(&constants);
            let reader = thread::spawn(move || (ask(&reader, 1), ask(&reader, 2)));
            assert!(learn(&constants, 2, 0xbb));
            let (first, second) = reader.join().unwrap();
            assert_eq!(first, Some([0xaa; 8]));
            if let Some(answer) = second {
                assert_eq!(answer, [0xbb; 8]);
            }
        });
    }

    #[test]
    fn who_learns_at_the_same_time_takes_nobodys_place() {
        loom::model(|| {
            let constants = Arc::new(Constants::new());
            let other = Arc::clone(&constants);
            let other = thread::spawn(move || learn(&other, 1, 0xaa));
            let second = learn(&constants, 2, 0xbb);
            let first = other.join().unwrap();
            assert!(first || second, "one of them is alone or was first");
            assert_eq!(ask(&constants, 1), first.then_some([0xaa; 8]));
            assert_eq!(ask(&constants, 2), second.then_some([0xbb; 8]));
        });
    }

    #[test]
    fn a_question_is_noted_once_however_many_ask_it() {
        loom::model(|| {
            let constants = Arc::new(Constants::new());
            let other = Arc::clone(&constants);
            let other = thread::spawn(move || learn(&other, 1, 0xaa));
            let here = learn(&constants, 1, 0xaa);
            assert!(here != other.join().unwrap(), "exactly one has noted it");
            assert_eq!(ask(&constants, 1), Some([0xaa; 8]));
            assert_eq!(constants.used.load(Ordering::Relaxed), HEADER + 2);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn learn(constants: &Constants, command: u32, question: &[u8], answer: &[u8]) -> bool {
        let draft = constants.draft(command, question);
        draft.map(|draft| draft.complete(answer)).is_some()
    }

    fn ask(constants: &Constants, command: u32, question: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = question.to_vec();
        buffer.resize(question.len() + 64, 0xee);
        let length = constants.answer(command, &mut buffer, question.len())?;
        buffer.truncate(length);
        Some(buffer)
    }

    #[test]
    fn an_answer_is_given_for_the_same_command_and_the_same_bytes_only() {
        let constants = Constants::new();
        assert_eq!(ask(&constants, 1, b"question"), None);
        assert!(learn(&constants, 1, b"question", b"the answer"));
        assert!(learn(&constants, 1, b"questions", b""));
        assert_eq!(ask(&constants, 1, b"question").unwrap(), b"the answer");
        assert_eq!(ask(&constants, 1, b"questions").unwrap(), b"");
        for (command, question) in [
            (2, &b"question"[..]),
            (1, b"questiom"),
            (1, b"question\0"),
            (1, b"questio"),
            (1, b""),
        ] {
            assert_eq!(ask(&constants, command, question), None, "{question:?}");
        }
    }

    #[test]
    fn an_answer_longer_than_the_buffer_is_not_given() {
        let constants = Constants::new();
        assert!(learn(&constants, 1, b"?", &[7; 20]));
        assert_eq!(constants.answer(1, &mut [b'?'; 19], 1), None);
        let mut buffer = [b'?'; 20];
        assert_eq!(constants.answer(1, &mut buffer, 1), Some(20));
        assert_eq!(buffer, [7; 20]);
    }

    #[test]
    fn a_question_without_an_answer_leaves_nothing_behind() {
        let constants = Constants::new();
        let draft = constants.draft(1, b"no answer");
        assert!(constants.draft(1, b"another").is_none(), "two at a time");
        drop(draft);
        assert_eq!(ask(&constants, 1, b"no answer"), None);
        assert!(learn(&constants, 1, b"another", b"!"));
        assert_eq!(ask(&constants, 1, b"another").unwrap(), b"!");
    }

    #[test]
    fn a_known_question_is_not_noted_again() {
        let constants = Constants::new();
        assert!(learn(&constants, 1, b"?", b"!"));
        assert!(!learn(&constants, 1, b"?", b"other"));
        assert_eq!(ask(&constants, 1, b"?").unwrap(), b"!");
    }

    #[test]
    fn a_full_table_answers_what_it_has_and_takes_no_more() {
        let constants = Constants::new();
        assert!(constants.draft(0, &[0; 8 * WORDS]).is_none());
        let mut known = 0u32;
        // The last draft may have room for its question and none for its answer.
        while learn(&constants, known, &[1; 24], &[2; 24])
            && ask(&constants, known, &[1; 24]).is_some()
        {
            known += 1;
        }
        assert_eq!(known as usize, WORDS / 8);
        for command in 0..known {
            assert_eq!(ask(&constants, command, &[1; 24]).unwrap(), [2; 24]);
        }
    }

    #[test]
    fn a_lost_device_has_no_answers_until_it_speaks_again() {
        let constants = Constants::new();
        assert!(learn(&constants, 1, b"?", b"!"));
        constants.heard(Err(Errno::ENODEV));
        assert_eq!(ask(&constants, 1, b"?"), None);
        constants.heard(Err(Errno::EINVAL));
        assert_eq!(ask(&constants, 1, b"?").unwrap(), b"!");
    }

    #[test]
    fn threads_that_ask_and_learn_at_once_get_whole_answers() {
        let constants = Constants::new();
        let question = |number: u32| [number.to_le_bytes(); 3].concat();
        let answer = |number: u32| std::vec![(number % 251) as u8; 40];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    // Miri finds races in few rounds, and takes a second for each of the others.
                    for round in 0..if cfg!(miri) { 30 } else { 3_000u32 } {
                        let number = round % 300;
                        match ask(&constants, 9, &question(number)) {
                            Some(found) => assert_eq!(found, answer(number)),
                            None => {
                                learn(&constants, 9, &question(number), &answer(number));
                            }
                        }
                    }
                });
            }
        });
        for number in 0..300 {
            // Not noted yet only if another question was being asked each time.
            learn(&constants, 9, &question(number), &answer(number));
            assert_eq!(ask(&constants, 9, &question(number)), Some(answer(number)));
        }
    }
}
