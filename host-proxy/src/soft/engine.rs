//! Engines: threads that execute submissions, and the queues that they take them from.
//!
//! Every guest has a scheduler and engines of its own, so that its queues hold up no other guest's; who of them executes
//! is a matter of [`super::turn`]. Every file has a queue, which is a timeline: its submissions are executed one after
//! the other, in order. A guest's queues take turns. A submission that waits for a fence holds up its own queue and no
//! other. One lock guards all queues of a guest; fences are signaled, and submissions dropped, without it.

use super::buffer::Buffer;
use super::command::{self, Command};
use super::fence::{Fence, Observer, Status, lock};
use super::turn::{Guest, Turn, Turns};
use crate::clock::thread_ns;
use crate::sandbox::Filter;
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::soft::{HANGS_MAX, QUEUE_MAX};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most bytes that the jobs of one queue may take (`EAGAIN`).
const QUEUE_BYTES_MAX: usize = 16 << 20;
/// Most bytes that the jobs of all queues of a guest may take (`EAGAIN`).
const GUEST_BYTES_MAX: usize = 256 << 20;
/// What a job takes beyond its commands: lists of buffers and fences.
const JOB_BYTES: usize = 4096;
/// How often a submission that hangs looks whether it is to be stopped.
const HANG_PERIOD: Duration = Duration::from_millis(1);
/// How many of the last submissions of a queue can be waited for by number with their result.
const RECENT: usize = 2 * QUEUE_MAX as usize;

/// Work for an engine.
pub(super) struct Job {
    /// What to execute.
    pub(super) commands: Vec<Command>,
    /// Bytes of the stream that the commands came from: what they take beyond their own size.
    pub(super) length: usize,
    /// What it uses; kept alive until it is finished.
    pub(super) buffers: Vec<Arc<Buffer>>,
    /// What it waits for.
    pub(super) waits: Vec<Arc<Fence>>,
}

impl Job {
    /// Bytes of this process's memory that it takes, about.
    fn bytes(&self) -> usize {
        let commands = self.commands.capacity() * size_of::<Command>();
        commands.saturating_add(self.length) + JOB_BYTES
    }
}

/// Why a submission was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It ran too long: the watchdog resets its engine.
    Hung,
    /// It accessed memory outside of a buffer.
    Fault,
    /// Its file was closed.
    Closed,
    /// The driver has a bug.
    Broken,
}

impl From<super::memory::OutOfBounds> for Stop {
    fn from(_: super::memory::OutOfBounds) -> Self {
        Self::Fault
    }
}

/// What an executing submission asks between two pieces of work, so that it can be stopped.
pub(super) struct Progress {
    /// When to look whether it has run too long; pauses do not count.
    deadline: Cell<Instant>,
    /// How much processor time it may take.
    watchdog: Duration,
    /// Processor time of the engine when it began, in nanoseconds.
    begin: u64,
    closed: Arc<AtomicBool>,
    turn: Turn,
}

impl Progress {
    /// Of a submission that begins now, on this thread.
    fn begin(watchdog: Duration, closed: Arc<AtomicBool>, turn: Turn) -> Self {
        Self {
            deadline: Cell::new(Instant::now() + watchdog),
            watchdog,
            begin: thread_ns(),
            closed,
            turn,
        }
    }

    /// Whether it may go on. Pauses while it is another guest's turn. What counts is processor time: a host that has little of
    /// it makes no submission hang.
    pub(super) fn check(&self) -> Result<(), Stop> {
        let now = Instant::now();
        if self.closed.load(Ordering::Relaxed) {
            return Err(Stop::Closed);
        }
        if now >= self.deadline.get() {
            let taken = Duration::from_nanos(thread_ns().saturating_sub(self.begin));
            let left = self.watchdog.saturating_sub(taken);
            if left.is_zero() {
                return Err(Stop::Hung);
            }
            self.deadline.set(now + left);
        }
        let paused = self.turn.go_on(now);
        self.deadline.set(self.deadline.get() + paused);
        Ok(())
    }

    /// Does nothing until it is stopped, without keeping other guests from executing.
    pub(super) fn hang(&self) -> Stop {
        while Instant::now() < self.deadline.get() {
            if self.closed.load(Ordering::Relaxed) {
                return Stop::Closed;
            }
            self.turn.rest(HANG_PERIOD);
        }
        Stop::Hung
    }
}

/// What went wrong so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Faults {
    /// Resets of all engines of the guest.
    pub(super) resets: u64,
    /// Submissions of the queue that hung.
    pub(super) hangs: u64,
    /// Submissions of the queue that faulted.
    pub(super) faults: u64,
}

/// All queues of a guest.
pub(super) struct Scheduler {
    state: Mutex<State>,
    /// There is work, or no more to come.
    work: Condvar,
    watchdog: Duration,
    turns: Arc<Turns>,
    guest: Arc<Guest>,
}

#[derive(Default)]
struct State {
    queues: BTreeMap<u64, Queue>,
    /// Queues whose next job can start, in the order of their turns.
    ready: VecDeque<u64>,
    last_queue: u64,
    /// Bytes of all jobs that have not started.
    bytes: usize,
    resets: u64,
    stopping: bool,
}

/// Jobs that have not started, with their fences.
type Jobs = VecDeque<(Job, Arc<Fence>)>;

impl State {
    /// Removes a queue, whose jobs are then to be cancelled.
    fn remove(&mut self, id: u64) -> Option<Jobs> {
        let queue = self.queues.remove(&id)?;
        self.bytes = self.bytes.saturating_sub(queue.bytes);
        Some(queue.jobs)
    }
}

struct Queue {
    jobs: Jobs,
    /// Bytes that they take.
    bytes: usize,
    /// Whether an engine executes a job, or the queue is in [`State::ready`].
    taken: bool,
    /// Set when the file is closed.
    closed: Arc<AtomicBool>,
    /// Told when the fence is signaled that the next job waits for.
    observer: Arc<dyn Observer>,
    /// Number of the last submission.
    seqno: u64,
    /// Fences of the last submissions, the newest last.
    recent: VecDeque<Arc<Fence>>,
    hangs: u64,
    faults: u64,
}

/// Looks at a queue again.
struct Reconsider {
    scheduler: Weak<Scheduler>,
    queue: u64,
}

impl Observer for Reconsider {
    fn changed(&self) {
        if let Some(scheduler) = self.scheduler.upgrade() {
            scheduler.consider(&mut lock(&scheduler.state), self.queue);
        }
    }
}

impl Scheduler {
    /// Queues of a guest that takes part in `turns`, and whose jobs may run for `watchdog` at most.
    pub(super) fn new(watchdog: Duration, turns: &Arc<Turns>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            work: Condvar::new(),
            watchdog,
            turns: turns.clone(),
            guest: Guest::new(),
        })
    }

    /// How long a job may run.
    pub(super) fn watchdog(&self) -> Duration {
        self.watchdog
    }

    /// A new queue.
    pub(super) fn open(self: &Arc<Self>) -> u64 {
        let mut state = lock(&self.state);
        state.last_queue += 1;
        let id = state.last_queue;
        let queue = Queue {
            jobs: VecDeque::new(),
            bytes: 0,
            taken: false,
            closed: Arc::default(),
            observer: Arc::new(Reconsider {
                scheduler: Arc::downgrade(self),
                queue: id,
            }),
            seqno: 0,
            recent: VecDeque::new(),
            hangs: 0,
            faults: 0,
        };
        state.queues.insert(id, queue);
        id
    }

    /// Ends a queue: what has not started is dropped, what runs is stopped.
    pub(super) fn close(&self, id: u64) {
        let dropped = {
            let mut state = lock(&self.state);
            let state = &mut *state;
            let Some(queue) = state.queues.get_mut(&id) else {
                return;
            };
            queue.closed.store(true, Ordering::Relaxed);
            // A job that runs is on an engine, which then drops the rest: fences are signaled in order.
            if queue.taken && !state.ready.contains(&id) {
                return;
            }
            state.ready.retain(|ready| *ready != id);
            state.remove(id)
        };
        cancel(dropped);
    }

    /// Adds a job to a queue and gives its number and fence: `EAGAIN` when the queue is full, `EIO` when it is banned.
    pub(super) fn submit(&self, id: u64, job: Job) -> Result<(u64, Arc<Fence>), Errno> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let queue = state.queues.get_mut(&id).ok_or(Errno::ENODEV)?;
        if queue.hangs >= HANGS_MAX {
            return Err(Errno::EIO);
        }
        let bytes = job.bytes();
        if queue.jobs.len() >= QUEUE_MAX as usize
            || queue.bytes + bytes > QUEUE_BYTES_MAX
            || state.bytes + bytes > GUEST_BYTES_MAX
        {
            return Err(Errno::EAGAIN);
        }
        queue.bytes += bytes;
        state.bytes += bytes;
        queue.seqno += 1;
        let seqno = queue.seqno;
        let fence = Fence::pending(id, seqno);
        if queue.recent.len() >= RECENT {
            queue.recent.pop_front();
        }
        queue.recent.push_back(fence.clone());
        for buffer in &job.buffers {
            buffer.add_fence(&fence);
        }
        queue.jobs.push_back((job, fence.clone()));
        if queue.jobs.len() == 1 {
            self.consider(state, id);
        }
        Ok((seqno, fence))
    }

    /// The fence of a submission; one that was signaled long ago counts as successful. `EINVAL` when there was none.
    pub(super) fn fence(&self, id: u64, seqno: u64) -> Result<Arc<Fence>, Errno> {
        let state = lock(&self.state);
        let queue = state.queues.get(&id).ok_or(Errno::ENODEV)?;
        let back = queue.seqno.checked_sub(seqno).ok_or(Errno::EINVAL)?;
        if seqno == 0 {
            return Err(Errno::EINVAL);
        }
        let back = usize::try_from(back).unwrap_or(usize::MAX);
        let fence = queue.recent.iter().rev().nth(back);
        Ok(fence.cloned().unwrap_or_else(Fence::signaled))
    }

    /// What went wrong so far.
    pub(super) fn faults(&self, id: u64) -> Faults {
        let state = lock(&self.state);
        let queue = state.queues.get(&id);
        Faults {
            resets: state.resets,
            hangs: queue.map_or(0, |queue| queue.hangs),
            faults: queue.map_or(0, |queue| queue.faults),
        }
    }

    /// Makes a queue ready if its next job can start; otherwise has itself called again when that may have changed.
    fn consider(&self, state: &mut State, id: u64) {
        let Some(queue) = state.queues.get_mut(&id) else {
            return;
        };
        if queue.taken {
            return;
        }
        let Some((job, _)) = queue.jobs.front_mut() else {
            return;
        };
        while let Some(fence) = job.waits.last() {
            if fence.observe(&queue.observer) {
                return;
            }
            job.waits.pop();
        }
        queue.taken = true;
        state.ready.push_back(id);
        self.work.notify_one();
    }

    /// What an engine does until it is stopped.
    fn run(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.stopping {
                return;
            }
            let next = state.ready.pop_front();
            let started = next.and_then(|id| Some((id, state.queues.get_mut(&id)?)));
            let Some((id, queue)) = started else {
                state = match state.ready.is_empty() {
                    true => self
                        .work
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner),
                    false => state,
                };
                continue;
            };
            let Some((job, fence)) = queue.jobs.pop_front() else {
                queue.taken = false;
                continue;
            };
            let bytes = job.bytes();
            queue.bytes = queue.bytes.saturating_sub(bytes);
            let closed = queue.closed.clone();
            state.bytes = state.bytes.saturating_sub(bytes);
            drop(state);
            let turn = self.turns.take(&self.guest);
            let progress = Progress::begin(self.watchdog, closed, turn);
            let ended = execute(&job.commands, &progress);
            drop(progress);
            drop(job);
            let status = self.account(id, ended);
            fence.signal(status);
            let dropped = self.finish(id);
            cancel(dropped);
            state = lock(&self.state);
        }
    }

    /// Counts how a job ended and tells what its fence gets.
    fn account(&self, id: u64, ended: Result<(), Stop>) -> Status {
        let mut state = lock(&self.state);
        let Err(stop) = ended else { return Ok(()) };
        if stop == Stop::Hung {
            state.resets += 1;
        }
        let queue = state.queues.get_mut(&id);
        match (stop, queue) {
            (Stop::Hung, Some(queue)) => queue.hangs += 1,
            (Stop::Fault, Some(queue)) => queue.faults += 1,
            _ => {}
        }
        Err(match stop {
            Stop::Hung | Stop::Broken => Errno::EIO,
            Stop::Fault => Errno::EFAULT,
            Stop::Closed => Errno::ECANCELED,
        })
    }

    /// Puts a queue back after a job. When it was closed meanwhile or is banned now, all its jobs are to be dropped.
    fn finish(&self, id: u64) -> Option<Jobs> {
        let mut state = lock(&self.state);
        let queue = state.queues.get_mut(&id)?;
        queue.taken = false;
        if queue.closed.load(Ordering::Relaxed) {
            return state.remove(id);
        }
        if queue.hangs >= HANGS_MAX {
            let bytes = std::mem::take(&mut queue.bytes);
            let jobs = std::mem::take(&mut queue.jobs);
            state.bytes = state.bytes.saturating_sub(bytes);
            return Some(jobs);
        }
        self.consider(&mut state, id);
        None
    }
}

/// Cancels jobs that will never start.
fn cancel(jobs: Option<Jobs>) {
    for (job, fence) in jobs.into_iter().flatten() {
        drop(job);
        fence.signal(Err(Errno::ECANCELED));
    }
}

/// Executes commands. A panic would be a bug of this driver or of a library; it must not take the engine with it.
fn execute(commands: &[Command], progress: &Progress) -> Result<(), Stop> {
    let work = || {
        commands.iter().try_for_each(|command| {
            progress.check()?;
            command::execute(command, progress)
        })
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(Err(Stop::Broken))
}

/// The threads of a guest.
pub(super) struct Engines {
    scheduler: Arc<Scheduler>,
    threads: Vec<JoinHandle<()>>,
}

impl Engines {
    /// Starts `count` engines under that filter.
    pub(super) fn start(
        scheduler: &Arc<Scheduler>,
        count: u32,
        filter: &Filter,
    ) -> io::Result<Self> {
        let mut engines = Self {
            scheduler: scheduler.clone(),
            threads: Vec::new(),
        };
        for number in 0..count {
            let scheduler = scheduler.clone();
            let name = format!("soft-engine-{number}");
            let thread = filter.spawn(name, move || scheduler.run())?;
            engines.threads.push(thread);
        }
        Ok(engines)
    }
}

impl Drop for Engines {
    /// Stops them. All queues are closed by then, so that no job is left to run.
    fn drop(&mut self) {
        lock(&self.scheduler.state).stopping = true;
        self.scheduler.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("an engine of the embedded GPU has died");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_hangs_by_the_processor_time_that_it_takes_and_not_by_the_clock() {
        let watchdog = Duration::from_millis(50);
        let turn = Turns::new(1).take(&Guest::new());
        let progress = Progress::begin(watchdog, Arc::default(), turn);
        std::thread::sleep(2 * watchdog);
        assert_eq!(progress.check(), Ok(()));
        let begin = thread_ns();
        while thread_ns() - begin < 50_000_000 {}
        // The clock may have to reach the new deadline first.
        std::thread::sleep(watchdog);
        assert_eq!(progress.check(), Err(Stop::Hung));
    }
}
