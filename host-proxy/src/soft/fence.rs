//! Fences: when a submission is finished, and how it ended.
//!
//! A fence is a place on a timeline. The engine signals it once, and never again; everybody else asks, waits
//! ([`wait`]) or is told ([`Observer`]). Nothing may run an observer while a lock is held that the observer takes.

use crate::cancel::Cancel;
use crate::clock::monotonic_ns;
use crate::driver::HostObject;
use pvgpu_protocol::Errno;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// How a submission ended.
pub(super) type Status = Result<(), Errno>;

/// One that is told of a change; it then looks for itself.
pub(super) trait Observer: Send + Sync {
    /// Something that it observes has changed. May be called too often and from any thread.
    fn changed(&self);
}

/// Locks, whatever a panicking thread left behind: the state is consistent after each statement that changes it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most fences that stand for several and have one fence in common (`ENOMEM`): each takes memory and time for all parts.
const JOINED_MAX: usize = 1024;

/// Observers that may have gone.
#[derive(Default)]
pub(super) struct Observers {
    list: Vec<Weak<dyn Observer>>,
    /// Length at which those that have gone are dropped.
    full: usize,
}

impl Observers {
    /// Adds an observer, unless it is already there.
    pub(super) fn add(&mut self, observer: &Arc<dyn Observer>) {
        let address = Arc::as_ptr(observer).cast::<()>();
        let same = |other: &Weak<dyn Observer>| other.as_ptr().cast::<()>() == address;
        if self.list.iter().any(same) {
            return;
        }
        if self.list.len() >= self.full {
            self.list.retain(|observer| observer.strong_count() > 0);
            self.full = (2 * self.list.len()).max(16);
        }
        self.list.push(Arc::downgrade(observer));
    }

    /// How many are still there, exact from `enough` on.
    fn count(&mut self, enough: usize) -> usize {
        if self.list.len() >= enough {
            self.list.retain(|observer| observer.strong_count() > 0);
        }
        self.list.len()
    }

    /// All that are still there, to be told once the lock is released.
    pub(super) fn take(&mut self) -> Vec<Arc<dyn Observer>> {
        let list = std::mem::take(&mut self.list);
        list.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A fence.
pub(super) struct Fence {
    /// Fences of one timeline are signaled in order. Zero for those that are on none.
    timeline: u64,
    seqno: u64,
    status: OnceLock<Status>,
    observers: Mutex<Observers>,
    /// For a fence that stands for several: those that were not signaled when it was made.
    parts: Vec<Arc<Fence>>,
}

impl Fence {
    /// A fence that is not signaled.
    pub(super) fn pending(timeline: u64, seqno: u64) -> Arc<Self> {
        Arc::new(Self::new(timeline, seqno, Vec::new()))
    }

    /// A fence that was always signaled.
    pub(super) fn signaled() -> Arc<Self> {
        let fence = Self::new(0, 0, Vec::new());
        fence.signal(Ok(()));
        Arc::new(fence)
    }

    fn new(timeline: u64, seqno: u64, parts: Vec<Arc<Self>>) -> Self {
        Self {
            timeline,
            seqno,
            status: OnceLock::new(),
            observers: Mutex::default(),
            parts,
        }
    }

    /// A fence that is signaled when all of these are. It holds at most one part per timeline, and parts have no
    /// parts, so that joining joined fences costs no more than joining their parts. `ENOMEM` when one of them is part of
    /// too many already.
    pub(super) fn join(fences: impl IntoIterator<Item = Arc<Self>>) -> Result<Arc<Self>, Errno> {
        let mut parts: BTreeMap<u64, Arc<Self>> = BTreeMap::new();
        let mut failed = None;
        let mut add = |fence: &Arc<Self>| match fence.status() {
            Some(Ok(())) => {}
            Some(Err(_)) => {
                failed.get_or_insert_with(|| fence.clone());
            }
            None => {
                let last = parts.entry(fence.timeline).or_insert(fence.clone());
                if last.seqno < fence.seqno {
                    *last = fence.clone();
                }
            }
        };
        for fence in fences {
            match fence.parts.is_empty() {
                true => add(&fence),
                false => fence.parts.iter().for_each(&mut add),
            }
        }
        let mut parts: Vec<_> = parts.into_values().collect();
        Ok(match (parts.pop(), failed) {
            (None, None) => Self::signaled(),
            (None, Some(failed)) => failed,
            (Some(only), None) if parts.is_empty() => only,
            (Some(last), failed) => {
                parts.push(last);
                parts.extend(failed);
                let crowded =
                    |part: &Arc<Self>| lock(&part.observers).count(JOINED_MAX) >= JOINED_MAX;
                if parts.iter().any(crowded) {
                    return Err(Errno::ENOMEM);
                }
                let joined = Arc::new(Self::new(0, 0, parts));
                let observer: Arc<dyn Observer> = joined.clone();
                for part in &joined.parts {
                    part.observe(&observer);
                }
                joined.changed();
                joined
            }
        })
    }

    /// The timeline it is on.
    pub(super) fn timeline(&self) -> u64 {
        self.timeline
    }

    /// How it ended, if it is signaled.
    pub(super) fn status(&self) -> Option<Status> {
        self.status.get().copied()
    }

    /// Whether it is signaled.
    pub(super) fn is_signaled(&self) -> bool {
        self.status.get().is_some()
    }

    /// Signals it; only the first call counts.
    pub(super) fn signal(&self, status: Status) {
        let observers = {
            let mut observers = lock(&self.observers);
            if self.status.set(status).is_err() {
                return;
            }
            observers.take()
        };
        observers.iter().for_each(|observer| observer.changed());
    }

    /// Tells `observer` when the fence is signaled. `false` when it already is: then nobody is told.
    pub(super) fn observe(&self, observer: &Arc<dyn Observer>) -> bool {
        let mut observers = lock(&self.observers);
        if self.is_signaled() {
            return false;
        }
        observers.add(observer);
        true
    }
}

impl Observer for Fence {
    /// A part was signaled.
    fn changed(&self) {
        let mut status = Ok(());
        for part in &self.parts {
            match part.status() {
                Some(Err(error)) => status = status.and(Err(error)),
                Some(Ok(())) => {}
                None => return,
            }
        }
        self.signal(status);
    }
}

/// A thread that waits.
#[derive(Default)]
struct Waiter {
    changed: Mutex<bool>,
    condition: Condvar,
}

impl Observer for Waiter {
    fn changed(&self) {
        *lock(&self.changed) = true;
        self.condition.notify_all();
    }
}

impl Waiter {
    /// Sleeps until something has changed since the last sleep; `false` when the deadline comes first.
    fn sleep(&self, deadline: Option<u64>) -> bool {
        let mut changed = lock(&self.changed);
        while !*changed {
            let Some(deadline) = deadline else {
                changed = self
                    .condition
                    .wait(changed)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_sub(monotonic_ns());
            if left == 0 {
                return false;
            }
            let sleep = self
                .condition
                .wait_timeout(changed, Duration::from_nanos(left));
            changed = sleep.unwrap_or_else(PoisonError::into_inner).0;
        }
        *changed = false;
        true
    }
}

/// Waits until `check` gives a result. It gets the observer to register with what it waits for, and is asked again
/// whenever that changes. `ETIME` after `deadline` (`CLOCK_MONOTONIC`, nanoseconds), `EINTR` when cancelled.
pub(super) fn wait<R>(
    deadline: Option<u64>,
    cancel: &Cancel,
    mut check: impl FnMut(&Arc<dyn Observer>) -> Option<R>,
) -> Result<R, Errno> {
    let waiter = Arc::new(Waiter::default());
    let observer: Arc<dyn Observer> = waiter.clone();
    let wake = waiter.clone();
    cancel.interruptible(Arc::new(move || wake.changed()), || {
        loop {
            if let Some(result) = check(&observer) {
                return Ok(result);
            }
            if cancel.is_cancelled() {
                return Err(Errno::EINTR);
            }
            if !waiter.sleep(deadline) {
                return check(&observer).ok_or(Errno::ETIME);
            }
        }
    })?
}

/// Waits until all fences are signaled; the status of the first that failed.
pub(super) fn wait_all(
    fences: &[Arc<Fence>],
    deadline: Option<u64>,
    cancel: &Cancel,
) -> Result<Status, Errno> {
    // Each fence is observed once, and the fences before `next` are signaled.
    let mut next = 0;
    wait(deadline, cancel, |observer| {
        while let Some(fence) = fences.get(next) {
            if fence.observe(observer) {
                return None;
            }
            next += 1;
        }
        let first = fences
            .iter()
            .filter_map(|fence| fence.status()?.err())
            .next();
        Some(first.map_or(Ok(()), Err))
    })
}

/// What `poll` says of a file that is ready when the fences are signaled.
pub(super) fn poll(
    fences: &[Arc<Fence>],
    ready: u32,
    timeout: Option<Duration>,
    cancel: &Cancel,
) -> Result<u32, Errno> {
    let deadline = timeout.map(|timeout| {
        let timeout = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        monotonic_ns().saturating_add(timeout)
    });
    match wait_all(fences, deadline, cancel) {
        Ok(_) => Ok(ready),
        Err(Errno::ETIME) => Ok(0),
        Err(error) => Err(error),
    }
}

/// A fence given out as a file descriptor (`sync_file`).
pub(super) struct SyncFile(pub(super) Arc<Fence>);

impl HostObject for SyncFile {
    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        let fences = [self.0.clone()];
        let ready = events & (libc::POLLIN as u32);
        if ready == 0 {
            return poll(&[Fence::pending(0, 0)], 0, timeout, cancel);
        }
        poll(&fences, ready, timeout, cancel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_joined_fence_is_signaled_by_its_last_part() {
        let (a, b) = (Fence::pending(1, 1), Fence::pending(2, 1));
        let joined = Fence::join([a.clone(), b.clone()]).unwrap();
        a.signal(Ok(()));
        assert_eq!(joined.status(), None);
        b.signal(Err(Errno::EFAULT));
        assert_eq!(joined.status(), Some(Err(Errno::EFAULT)));
    }

    #[test]
    fn joining_keeps_one_part_per_timeline_however_often_it_is_repeated() {
        let last = Fence::pending(1, 9);
        let mut joined = Fence::join([Fence::pending(2, 1), last.clone()]).unwrap();
        for seqno in 1..100 {
            joined = Fence::join([Fence::pending(1, seqno % 9), joined]).unwrap();
        }
        assert_eq!(joined.parts.len(), 2);
        assert!(joined.parts.iter().any(|part| Arc::ptr_eq(part, &last)));
        assert!(joined.parts.iter().all(|part| part.parts.is_empty()));
    }

    #[test]
    fn joining_nothing_or_what_is_over_is_over() {
        assert_eq!(Fence::join([]).unwrap().status(), Some(Ok(())));
        let failed = Fence::pending(1, 1);
        failed.signal(Err(Errno::ECANCELED));
        let joined = Fence::join([Fence::signaled(), failed]).unwrap();
        assert_eq!(joined.status(), Some(Err(Errno::ECANCELED)));
    }

    #[test]
    fn a_fence_is_part_of_only_so_many_others_at_a_time() {
        let parts = [Fence::pending(1, 1), Fence::pending(2, 1)];
        let join = || Fence::join(parts.clone());
        let joined: Vec<_> = (0..JOINED_MAX).map(|_| join().unwrap()).collect();
        assert_eq!(join().err(), Some(Errno::ENOMEM));
        drop(joined);
        assert!(join().is_ok());
    }

    #[test]
    fn only_the_first_signal_counts() {
        let fence = Fence::pending(1, 1);
        fence.signal(Err(Errno::EIO));
        fence.signal(Ok(()));
        assert_eq!(fence.status(), Some(Err(Errno::EIO)));
    }

    #[test]
    fn waiting_ends_at_the_deadline_and_leaves_no_observer_behind() {
        let fence = Fence::pending(1, 1);
        for _ in 0..1000 {
            let result = wait_all(std::slice::from_ref(&fence), Some(1), &Cancel::new());
            assert_eq!(result, Err(Errno::ETIME));
        }
        assert!(lock(&fence.observers).list.len() <= 16);
    }

    #[test]
    fn a_wait_is_woken_by_the_signal_from_another_thread() {
        let fence = Fence::pending(1, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| fence.signal(Err(Errno::EIO)));
            let result = wait_all(std::slice::from_ref(&fence), None, &Cancel::new());
            assert_eq!(result, Ok(Err(Errno::EIO)));
        });
    }

    #[test]
    fn a_cancelled_wait_comes_back() {
        let fence = Fence::pending(1, 1);
        let cancel = Cancel::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_all(std::slice::from_ref(&fence), None, &cancel));
            while !waiting.is_finished() {
                cancel.cancel();
            }
            assert_eq!(waiting.join().unwrap(), Err(Errno::EINTR));
        });
    }
}
