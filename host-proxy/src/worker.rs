//! The threads on which requests that may block wait.
//!
//! [`crate::session`] hands such a request over with its [`Cancel`]; it completes whenever it is done, in any order.
//! A thread is started when none is idle, so one waiting request never holds up another; how many there can be is
//! the session's limit on requests in flight.

use crate::cancel::Cancel;
use crate::logging::guest_log;
use crate::sandbox::Filter;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(2);
/// How often a cancelled request is woken until it is done: a wake-up just before it waits is lost.
const WAKE_PERIOD: Duration = Duration::from_millis(1);

/// What a thread of the pool does.
pub type Job = Box<dyn FnOnce() + Send>;

/// The host has no thread for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoThread;

/// A pool of threads. Dropping it waits for all requests.
pub struct Workers {
    shared: Arc<Shared>,
    filter: Filter,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or the pool closes.
    job: Condvar,
    /// A request was cancelled, a thread ended, or the pool closes.
    change: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Those threads and the one that wakes, and some that have ended since.
    handles: Vec<JoinHandle<()>>,
    idle: usize,
    /// Cancelled requests that are not known to be done.
    cancelled: Vec<Arc<Cancel>>,
    waking: bool,
    closing: bool,
}

impl State {
    /// Keeps a thread to be joined, and forgets those that have ended.
    fn keep(&mut self, handle: JoinHandle<()>) {
        self.handles.retain(|handle| !handle.is_finished());
        self.handles.push(handle);
    }
}

impl Workers {
    /// A pool without threads, which start under that filter.
    pub fn new(filter: Filter) -> Self {
        Self {
            filter,
            shared: Arc::new(Shared {
                state: Mutex::default(),
                job: Condvar::new(),
                change: Condvar::new(),
            }),
        }
    }

    /// Runs a job on a thread of the pool. The job is made only when there is a thread for it: otherwise whatever it
    /// would hold is still the caller's.
    pub fn run(&self, job: impl FnOnce() -> Job) -> Result<(), NoThread> {
        let mut state = self.shared.lock();
        if state.idle <= state.jobs.len() {
            let shared = Arc::clone(&self.shared);
            let started = self
                .filter
                .spawn("pvgpu-worker".into(), move || shared.work());
            match started {
                Ok(handle) => {
                    state.threads += 1;
                    state.keep(handle);
                }
                Err(error) => {
                    guest_log!(warn, "cannot start a worker thread: {error}");
                    return Err(NoThread);
                }
            }
        }
        state.jobs.push_back(job());
        self.shared.job.notify_one();
        Ok(())
    }

    /// Cancels a request and wakes it until it is done.
    pub fn cancel(&self, cancel: Arc<Cancel>) {
        self.cancel_on(cancel, |wake| {
            self.filter.spawn("pvgpu-cancel".into(), wake)
        });
    }

    /// Cancels a request; `start` starts the thread that wakes it. When there can be none, the caller waits until all
    /// cancelled requests are done: they are of the guest that has taken the threads.
    fn cancel_on(
        &self,
        cancel: Arc<Cancel>,
        start: impl FnOnce(Job) -> io::Result<JoinHandle<()>>,
    ) {
        cancel.cancel();
        let mut state = self.shared.lock();
        // Once each: `wake` counts references to tell whether a request is done.
        if state
            .cancelled
            .iter()
            .any(|other| Arc::ptr_eq(other, &cancel))
        {
            return;
        }
        state.cancelled.push(cancel);
        if std::mem::replace(&mut state.waking, true) {
            return;
        }
        drop(state);
        let shared = Arc::clone(&self.shared);
        match start(Box::new(move || shared.wake())) {
            Ok(handle) => self.shared.lock().keep(handle),
            Err(error) => {
                guest_log!(warn, "cannot start a thread that cancels requests: {error}");
                self.shared.wake();
            }
        }
    }
}

impl Workers {
    /// Waits until all requests are done and all threads have ended. Later jobs start new threads.
    pub fn drain(&self) {
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.job.notify_all();
        while state.threads > 0 || state.waking {
            state = self
                .shared
                .change
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.closing = false;
        let handles = std::mem::take(&mut state.handles);
        drop(state);
        // They have nothing left to do, but still have to give back what a thread takes.
        for handle in handles {
            // A job that panicked has been reported.
            let _ = handle.join();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.drain();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker thread.
    fn work(&self) {
        let _leaving = Leaving(self);
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            if state.closing {
                break;
            }
            state.idle += 1;
            let (guard, timeout) = self
                .job
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
    }

    /// The thread that wakes cancelled requests; it ends when all are done.
    fn wake(&self) {
        loop {
            let mut state = self.lock();
            // A request that is done has dropped its own reference.
            state
                .cancelled
                .retain(|cancel| Arc::strong_count(cancel) > 1);
            if state.cancelled.is_empty() {
                state.waking = false;
                self.change.notify_all();
                return;
            }
            let cancelled = state.cancelled.clone();
            drop(state);
            cancelled.iter().for_each(|cancel| cancel.cancel());
            drop(cancelled);
            thread::sleep(WAKE_PERIOD);
        }
    }
}

/// Counts a worker thread out, even if its job panics.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.change.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_waiting_job_does_not_hold_up_another() {
        let workers = Workers::new(Filter::OFF);
        let (release, blocked) = mpsc::channel::<()>();
        let (done, result) = mpsc::channel();
        workers
            .run(|| Box::new(move || blocked.recv().unwrap()))
            .unwrap();
        workers
            .run(|| Box::new(move || done.send(7).unwrap()))
            .unwrap();
        assert_eq!(result.recv().unwrap(), 7);
        release.send(()).unwrap();
    }

    /// Cancels a job that loses the first wake-up, and waits for its end.
    fn cancel_with_a_lost_wake_up(cancel_on: impl FnOnce(&Workers, Arc<Cancel>)) {
        let workers = Workers::new(Filter::OFF);
        let cancel = Arc::new(Cancel::new());
        let (wake, woken) = mpsc::channel();
        let (begun, waits) = mpsc::channel();
        let (done, result) = mpsc::channel();
        let job_cancel = Arc::clone(&cancel);
        workers
            .run(|| {
                Box::new(move || {
                    let wake = Arc::new(move || wake.send(()).unwrap_or(()));
                    // The first wake-up is lost on purpose: only a second one ends the wait.
                    let waited = job_cancel.interruptible(wake, || {
                        begun.send(()).unwrap();
                        woken.recv().unwrap();
                        woken.recv().unwrap();
                    });
                    done.send(waited).unwrap();
                })
            })
            .unwrap();
        waits.recv().unwrap();
        cancel_on(&workers, cancel);
        assert_eq!(
            result.recv_timeout(Duration::from_secs(10)).unwrap(),
            Ok(())
        );
    }

    #[test]
    fn a_cancelled_job_is_woken_even_if_it_begins_to_wait_later() {
        cancel_with_a_lost_wake_up(Workers::cancel);
    }

    #[test]
    fn a_cancelled_job_is_woken_even_if_no_thread_can_be_started_for_that() {
        cancel_with_a_lost_wake_up(|workers, cancel| {
            workers.cancel_on(cancel, |_| Err(io::ErrorKind::OutOfMemory.into()));
        });
    }

    #[test]
    fn a_job_that_is_cancelled_twice_does_not_hold_up_the_end() {
        let workers = Workers::new(Filter::OFF);
        let cancel = Arc::new(Cancel::new());
        let (wake, woken) = mpsc::channel();
        let job_cancel = Arc::clone(&cancel);
        workers
            .run(|| {
                Box::new(move || {
                    let wake = Arc::new(move || wake.send(()).unwrap_or(()));
                    let _ = job_cancel.interruptible(wake, || woken.recv());
                })
            })
            .unwrap();
        workers.cancel(Arc::clone(&cancel));
        workers.cancel(cancel);
        let (done, ended) = mpsc::channel();
        thread::spawn(move || {
            drop(workers);
            done.send(()).unwrap();
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn no_thread_of_a_drained_pool_has_anything_left_to_give_back() {
        /// What a thread gives back after its last job.
        struct Storage(mpsc::Sender<()>);

        impl Drop for Storage {
            fn drop(&mut self) {
                thread::sleep(Duration::from_millis(50));
                self.0.send(()).unwrap();
            }
        }

        thread_local! {
            static STORAGE: std::cell::RefCell<Option<Storage>> = const { std::cell::RefCell::new(None) };
        }
        let workers = Workers::new(Filter::OFF);
        let (given_back, result) = mpsc::channel();
        workers
            .run(|| {
                Box::new(move || {
                    STORAGE.set(Some(Storage(given_back)));
                })
            })
            .unwrap();
        workers.drain();
        assert_eq!(result.try_recv(), Ok(()));
    }

    #[test]
    fn dropping_the_pool_waits_for_its_jobs() {
        let workers = Workers::new(Filter::OFF);
        let (done, result) = mpsc::channel();
        workers
            .run(|| {
                Box::new(move || {
                    thread::sleep(Duration::from_millis(50));
                    done.send(()).unwrap();
                })
            })
            .unwrap();
        drop(workers);
        assert_eq!(result.try_recv(), Ok(()));
    }
}
