//! Turns: which guests' engines execute when several guests share the GPU.
//!
//! Every guest has engines of its own, but the GPU has only so many turns. An engine takes one before it executes a
//! submission, asks between pieces of work whether to go on ([`Turn::go_on`]), and gives it back. A turn that is given back
//! goes to the guest that has used the least time. A guest that is behind those which execute does not even wait for
//! that: it takes a turn more than there are, and who has used more pauses at its next question. So a guest with little
//! to do hardly notices the others, and those with much to do get equal shares.
//!
//! Nothing here knows what a turn is used for, and no turn is kept while its engine waits for anything.

use super::fence::lock;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How far one guest may be ahead of another that wants its turn: the time between two changes of turns among guests
/// with much to do.
const AHEAD: Duration = Duration::from_millis(2);
/// How far a guest is put behind the others at most, however long it has had nothing to do.
const BEHIND: Duration = Duration::from_millis(4);

/// The turns of a GPU.
pub(super) struct Turns {
    state: Mutex<State>,
    /// Whether anyone wants a turn, or there are too many: a hint that [`Turn::go_on`] reads without the lock.
    contended: AtomicBool,
}

struct State {
    /// Turns that nobody has. Negative when there are more than there should be.
    free: i64,
    running: Vec<Running>,
    waiting: Vec<Waiting>,
    /// What the guests that execute have used at least: where a new guest begins.
    floor: Duration,
    last_ticket: u64,
}

/// A guest among those that take turns. Its engines share it.
pub(super) struct Guest {
    /// How long its engines have executed, but for turns that are not over; raised for one that comes back.
    used: Mutex<Duration>,
}

struct Running {
    ticket: u64,
    guest: Arc<Guest>,
    since: Instant,
}

impl Running {
    /// What its guest has used until now (by this turn).
    fn used(&self, now: Instant) -> Duration {
        self.guest.used() + now.saturating_duration_since(self.since)
    }
}

struct Waiting {
    ticket: u64,
    guest: Arc<Guest>,
    granted: Arc<Condvar>,
}

impl Guest {
    /// A guest that has used nothing.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            used: Mutex::default(),
        })
    }

    fn used(&self) -> Duration {
        *lock(&self.used)
    }
}

impl Turns {
    /// So many turns at a time.
    pub(super) fn new(count: u32) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free: count.into(),
                running: Vec::new(),
                waiting: Vec::new(),
                floor: Duration::ZERO,
                last_ticket: 0,
            }),
            contended: AtomicBool::new(false),
        })
    }

    /// Waits for a turn.
    pub(super) fn take(self: &Arc<Self>, guest: &Arc<Guest>) -> Turn {
        let turn = Turn {
            turns: self.clone(),
            guest: guest.clone(),
            ticket: Cell::new(0),
        };
        turn.take();
        turn
    }

    /// Hands turns that are free to those that have used the least.
    fn hand_out(&self, state: &mut State, now: Instant) {
        while state.free > 0 {
            let places = state.waiting.iter().enumerate();
            let Some((place, _)) = places.min_by_key(|(_, waiting)| waiting.guest.used()) else {
                break;
            };
            let next = state.waiting.remove(place);
            state.start(next.ticket, next.guest, now);
            next.granted.notify_one();
        }
        let contended = state.free < 0 || !state.waiting.is_empty();
        self.contended.store(contended, Ordering::Relaxed);
    }
}

impl State {
    /// A ticket for a turn, or for a place among those that wait.
    fn ticket(&mut self) -> u64 {
        self.last_ticket += 1;
        self.last_ticket
    }

    fn start(&mut self, ticket: u64, guest: Arc<Guest>, since: Instant) {
        self.free -= 1;
        self.running.push(Running {
            ticket,
            guest,
            since,
        });
    }

    /// Ends a turn and books its time.
    fn stop(&mut self, ticket: u64, now: Instant) {
        let place = self.running.iter().position(|turn| turn.ticket == ticket);
        if let Some(place) = place {
            let turn = self.running.remove(place);
            let used = turn.used(now);
            *lock(&turn.guest.used) = used;
            self.floor = self.floor.max(self.least_used(now).unwrap_or(used));
            self.free += 1;
        }
    }

    /// What the guest that executes and has used the least has used.
    fn least_used(&self, now: Instant) -> Option<Duration> {
        self.running.iter().map(|turn| turn.used(now)).min()
    }

    /// Whether one that has used so much is to make room for another guest.
    fn is_ahead(&self, used: Duration, now: Instant) -> bool {
        let waiting = self.waiting.iter().map(|waiting| waiting.guest.used());
        let running = self.running.iter().map(|turn| turn.used(now));
        let others: Option<Duration> = match self.free < 0 {
            true => waiting.chain(running).min(),
            false => waiting.min(),
        };
        others.is_some_and(|others| used > others + AHEAD)
    }
}

/// The right to execute. Given back when dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    guest: Arc<Guest>,
    ticket: Cell<u64>,
}

impl Turn {
    /// Waits until it is this guest's turn.
    fn take(&self) {
        let now = Instant::now();
        let mut state = lock(&self.turns.state);
        state.floor = state.floor.max(state.least_used(now).unwrap_or_default());
        let used = {
            let mut used = lock(&self.guest.used);
            *used = (*used).max(state.floor.saturating_sub(BEHIND));
            *used
        };
        let ticket = state.ticket();
        self.ticket.set(ticket);
        let ahead = state
            .running
            .iter()
            .any(|turn| turn.used(now) > used + AHEAD);
        if state.free > 0 || ahead {
            state.start(ticket, self.guest.clone(), now);
            self.turns.hand_out(&mut state, now);
            return;
        }
        let granted = Arc::new(Condvar::new());
        state.waiting.push(Waiting {
            ticket,
            guest: self.guest.clone(),
            granted: granted.clone(),
        });
        self.turns.contended.store(true, Ordering::Relaxed);
        while state.waiting.iter().any(|waiting| waiting.ticket == ticket) {
            state = granted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self) {
        let now = Instant::now();
        let mut state = lock(&self.turns.state);
        state.stop(self.ticket.get(), now);
        self.turns.hand_out(&mut state, now);
    }

    /// Between two pieces of work: pauses while it is another guest's turn, and tells for how long.
    pub(super) fn go_on(&self, now: Instant) -> Duration {
        if !self.turns.contended.load(Ordering::Relaxed) {
            return Duration::ZERO;
        }
        let pause = {
            let state = lock(&self.turns.state);
            let mut running = state.running.iter();
            let turn = running.find(|turn| turn.ticket == self.ticket.get());
            turn.is_some_and(|turn| state.is_ahead(turn.used(now), now))
        };
        if !pause {
            return Duration::ZERO;
        }
        self.give_back();
        self.take();
        now.elapsed()
    }

    /// Does nothing for a while, in which others can have the turn.
    pub(super) fn rest(&self, time: Duration) {
        self.give_back();
        thread::sleep(time);
        self.take();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_guest_that_has_used_little_does_not_wait_for_one_that_has_used_much() {
        let turns = Turns::new(1);
        let (busy, quick) = (Guest::new(), Guest::new());
        let turn = turns.take(&busy);
        thread::sleep(BEHIND);
        // The busy one does not ask, and still the quick one gets its turn.
        drop(turns.take(&quick));
        assert_eq!(turn.go_on(Instant::now()), Duration::ZERO, "it is alone");
    }

    #[test]
    fn who_has_used_more_pauses_until_the_other_is_done() {
        let turns = Turns::new(1);
        let (busy, quick) = (Guest::new(), Guest::new());
        let turn = turns.take(&busy);
        thread::sleep(BEHIND);
        let (given, taken) = mpsc::channel();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let turn = turns.take(&quick);
                given.send(()).unwrap();
                assert_eq!(turn.go_on(Instant::now()), Duration::ZERO, "it is behind");
                thread::sleep(Duration::from_millis(20));
                done.store(true, Ordering::Relaxed);
            });
            taken.recv().unwrap();
            turn.go_on(Instant::now());
            assert!(done.load(Ordering::Relaxed));
        });
    }

    #[test]
    fn guests_with_much_to_do_get_equal_shares_however_many_engines_they_have() {
        let turns = Turns::new(2);
        let guests = [Guest::new(), Guest::new()];
        let end = Instant::now() + Duration::from_millis(300);
        thread::scope(|scope| {
            // One engine of the first guest, three of the second.
            for guest in [&guests[0], &guests[1], &guests[1], &guests[1]] {
                scope.spawn(|| {
                    let turn = turns.take(guest);
                    while Instant::now() < end {
                        thread::sleep(Duration::from_micros(200));
                        turn.go_on(Instant::now());
                    }
                });
            }
        });
        let [one, other] = guests.map(|guest| guest.used().as_secs_f64());
        assert!(one > 0.2 && other / one < 2.0, "{one} s and {other} s");
        assert_eq!(lock(&turns.state).free, 2);
    }

    #[test]
    fn a_guest_that_comes_back_cannot_take_what_it_has_not_used_for_long() {
        let turns = Turns::new(1);
        let (busy, late) = (Guest::new(), Guest::new());
        *lock(&busy.used) = Duration::from_secs(100);
        let turn = turns.take(&busy);
        drop(turns.take(&late));
        let used = late.used();
        assert!(used >= Duration::from_secs(100) - BEHIND, "{used:?}");
        drop(turn);
    }
}
