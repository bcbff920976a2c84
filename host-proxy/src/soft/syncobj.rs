//! Synchronization objects: boxes for fences, binary or with a timeline, with the semantics of the kernel's
//! (`drm_syncobj.c`, `dma-fence-chain.c`).

use super::fence::{Fence, Observer, Observers, lock, wait};
use crate::cancel::Cancel;
use crate::driver::HostObject;
use pvgpu_protocol::Errno;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Most points of a timeline that are not signaled (`ENOMEM`): more than a queue has submissions, and as many as a wait for
/// thousands of timelines can look through in some ten milliseconds.
const POINTS_MAX: usize = 512;
/// Most points of all timelines of a guest (`ENOMEM`).
const ALL_POINTS_MAX: usize = 65_536;

/// How many points the timelines of a guest have.
#[derive(Default)]
pub(super) struct Points(AtomicUsize);

/// A place among them, given back when dropped.
struct Place(Arc<Points>);

impl Place {
    fn take(points: &Arc<Points>) -> Self {
        points.0.fetch_add(1, Ordering::Relaxed);
        Self(points.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A synchronization object.
pub(super) struct Syncobj {
    state: Mutex<State>,
    points: Arc<Points>,
}

#[derive(Default)]
struct State {
    payload: Payload,
    /// Those that wait for a fence to be attached.
    observers: Observers,
}

/// What it holds.
#[derive(Default)]
enum Payload {
    /// Nothing was submitted yet.
    #[default]
    Empty,
    /// One fence.
    Binary(Arc<Fence>),
    /// Points in the order in which they were added. Those that are signaled may be missing, but never the last.
    Timeline(Vec<Point>),
}

/// A point of a timeline. It is reached when its fence and those of all points before it are signaled.
struct Point {
    seqno: u64,
    /// The point before it when it was added, zero for none.
    previous: u64,
    /// Points whose numbers grow share a context; one that is out of order starts another.
    context: u64,
    fence: Arc<Fence>,
    _place: Place,
}

impl Syncobj {
    /// An empty one, or one that is signaled, whose points count among the guest's.
    pub(super) fn new(signaled: bool, points: &Arc<Points>) -> Arc<Self> {
        let syncobj = Self {
            state: Mutex::default(),
            points: points.clone(),
        };
        if signaled {
            syncobj.set(Some(Fence::signaled()));
        }
        Arc::new(syncobj)
    }

    /// Replaces what it holds by one fence or by nothing.
    pub(super) fn set(&self, fence: Option<Arc<Fence>>) {
        let observers = {
            let mut state = lock(&self.state);
            let submitted = fence.is_some();
            state.payload = fence.map_or(Payload::Empty, Payload::Binary);
            match submitted {
                true => state.observers.take(),
                false => Vec::new(),
            }
        };
        observers.iter().for_each(|observer| observer.changed());
    }

    /// Whether it has room for another point (`ENOMEM`).
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        state.payload.prune();
        match &state.payload {
            Payload::Timeline(points) if points.len() >= POINTS_MAX => Err(Errno::ENOMEM),
            _ if self.points.0.load(Ordering::Relaxed) >= ALL_POINTS_MAX => Err(Errno::ENOMEM),
            _ => Ok(()),
        }
    }

    /// Attaches a fence: at `point`, or in place of all for point zero.
    pub(super) fn attach(&self, point: u64, fence: Arc<Fence>) {
        if point == 0 {
            return self.set(Some(fence));
        }
        let observers = {
            let mut state = lock(&self.state);
            state.payload.add(point, fence, &self.points);
            state.payload.prune();
            state.observers.take()
        };
        observers.iter().for_each(|observer| observer.changed());
    }

    /// The fence of `point` (zero: of all); `EINVAL` when none was attached yet, `ENOMEM` as [`Fence::join`].
    pub(super) fn fence(&self, point: u64) -> Result<Arc<Fence>, Errno> {
        let fence = lock(&self.state).payload.fence(point)?;
        fence.ok_or(Errno::EINVAL)
    }

    /// As [`Syncobj::fence`]; when there is none, `observer` is told of the next one.
    fn fence_or_observe(
        &self,
        point: u64,
        observer: &Arc<dyn Observer>,
    ) -> Result<Option<Arc<Fence>>, Errno> {
        let mut state = lock(&self.state);
        let fence = state.payload.fence(point)?;
        if fence.is_none() {
            state.observers.add(observer);
        }
        Ok(fence)
    }

    /// The last point reached, or the last one added.
    pub(super) fn query(&self, last_submitted: bool) -> u64 {
        let mut state = lock(&self.state);
        state.payload.prune();
        let Payload::Timeline(points) = &state.payload else {
            return 0;
        };
        let Some(last) = points.last() else { return 0 };
        if last_submitted {
            return last.seqno;
        }
        // The oldest point of the last one's context that is not reached; all before it in that context are.
        let context = points
            .iter()
            .rev()
            .take_while(|point| point.context == last.context)
            .last()
            .unwrap_or(last);
        match points.iter().all(|point| point.fence.is_signaled()) {
            true => last.seqno,
            false => context.previous,
        }
    }
}

impl Payload {
    /// Drops the points that are signaled, except the last.
    fn prune(&mut self) {
        let Self::Timeline(points) = self else { return };
        let last = points.pop();
        points.retain(|point| !point.fence.is_signaled());
        points.extend(last);
    }

    fn add(&mut self, seqno: u64, fence: Arc<Fence>, places: &Arc<Points>) {
        let mut points = match std::mem::take(self) {
            Self::Empty => Vec::new(),
            // What a binary one held comes before all points.
            Self::Binary(fence) => vec![Point {
                seqno: 0,
                previous: 0,
                context: 0,
                fence,
                _place: Place::take(places),
            }],
            Self::Timeline(points) => points,
        };
        let last = points.last().map(|last| (last.seqno, last.context));
        let (seqno, previous, context) = match last {
            None => (seqno, 0, 1),
            Some((0, context)) => (seqno, 0, context + 1),
            Some((last, context)) if last < seqno => (seqno, last, context),
            Some((last, context)) => (last, 0, context + 1),
        };
        points.push(Point {
            seqno,
            previous,
            context,
            fence,
            _place: Place::take(places),
        });
        *self = Self::Timeline(points);
    }

    fn fence(&self, seqno: u64) -> Result<Option<Arc<Fence>>, Errno> {
        let points = match self {
            Self::Empty => return Ok(None),
            Self::Binary(fence) => return Ok((seqno == 0).then(|| fence.clone())),
            Self::Timeline(points) => points,
        };
        let Some(last) = points.last().filter(|last| last.seqno >= seqno) else {
            return Ok(None);
        };
        let found = match seqno {
            0 => points.len().checked_sub(1),
            _ => points
                .iter()
                .rposition(|point| point.context != last.context || point.previous < seqno),
        };
        let reached = found.and_then(|found| points.get(..=found));
        let fences = reached.unwrap_or_default().iter();
        Fence::join(fences.map(|point| point.fence.clone())).map(Some)
    }
}

/// What to wait for.
#[derive(Clone, Copy)]
pub(super) struct Wait {
    /// For all, not for any.
    pub(super) all: bool,
    /// Fences may still be to come.
    pub(super) for_submit: bool,
    /// Only until there is a fence.
    pub(super) available: bool,
}

/// Waits for points of syncobjs and gives the index of the first one found: `EINVAL` when a fence is missing and may
/// not be to come, `ETIME` after `deadline`, `EINTR` when cancelled.
pub(super) fn wait_points(
    points: &[(Arc<Syncobj>, u64)],
    what: Wait,
    deadline: u64,
    cancel: &Cancel,
) -> Result<u32, Errno> {
    let mut fences: Vec<Option<Arc<Fence>>> = Vec::with_capacity(points.len());
    for (syncobj, point) in points {
        match syncobj.fence(*point) {
            Err(error) if error != Errno::EINVAL => return Err(error),
            Err(error) if !what.for_submit && !what.available => return Err(error),
            found => fences.push(found.ok()),
        }
    }
    let mut observed = vec![false; points.len()];
    wait(Some(deadline), cancel, |observer| {
        let mut first = None;
        let mut ready = 0;
        let entries = points.iter().zip(&mut fences).zip(&mut observed);
        for (index, (((syncobj, point), fence), observed)) in entries.enumerate() {
            if fence.is_none() {
                match syncobj.fence_or_observe(*point, observer) {
                    Ok(found) => *fence = found,
                    Err(error) => return Some(Err(error)),
                }
            }
            let Some(fence) = fence else { continue };
            let done = what.available || fence.is_signaled();
            if !done && (*observed || fence.observe(observer)) {
                *observed = true;
                continue;
            }
            ready += 1;
            first.get_or_insert(index);
            if !what.all {
                break;
            }
        }
        if ready == points.len() || (ready > 0 && !what.all) {
            Some(Ok(u32::try_from(first.unwrap_or(0)).unwrap_or(u32::MAX)))
        } else {
            None
        }
    })?
}

/// A syncobj given out as a file descriptor.
pub(super) struct SyncobjFile(pub(super) Arc<Syncobj>);

impl HostObject for SyncobjFile {
    /// Always ready, as a file without `poll` is.
    fn poll(&self, events: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        Ok(events & ((libc::POLLIN | libc::POLLOUT) as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syncobj(signaled: bool) -> Arc<Syncobj> {
        Syncobj::new(signaled, &Arc::default())
    }

    #[test]
    fn a_point_is_reached_when_all_before_it_are() {
        let syncobj = syncobj(false);
        let (five, nine) = (Fence::pending(1, 1), Fence::pending(2, 1));
        syncobj.attach(5, five.clone());
        syncobj.attach(9, nine.clone());
        assert_eq!((syncobj.query(false), syncobj.query(true)), (0, 9));
        nine.signal(Ok(()));
        assert!(!syncobj.fence(9).unwrap().is_signaled());
        assert_eq!(syncobj.query(false), 0);
        five.signal(Ok(()));
        assert!(syncobj.fence(9).unwrap().is_signaled());
        assert_eq!(syncobj.query(false), 9);
    }

    #[test]
    fn a_number_between_two_points_stands_for_the_next_one() {
        let syncobj = syncobj(false);
        let (five, nine) = (Fence::pending(1, 1), Fence::pending(1, 2));
        syncobj.attach(5, five.clone());
        syncobj.attach(9, nine.clone());
        assert!(Arc::ptr_eq(&syncobj.fence(3).unwrap(), &five));
        assert!(!Arc::ptr_eq(&syncobj.fence(7).unwrap(), &five));
        five.signal(Ok(()));
        assert_eq!(syncobj.query(false), 5);
        assert!(syncobj.fence(5).unwrap().is_signaled());
        assert!(Arc::ptr_eq(&syncobj.fence(7).unwrap(), &nine));
        assert_eq!(syncobj.fence(10).err(), Some(Errno::EINVAL));
    }

    #[test]
    fn a_point_out_of_order_takes_the_last_number() {
        let syncobj = syncobj(false);
        syncobj.attach(5, Fence::signaled());
        let late = Fence::pending(1, 1);
        syncobj.attach(3, late.clone());
        assert_eq!((syncobj.query(false), syncobj.query(true)), (0, 5));
        late.signal(Ok(()));
        assert_eq!(syncobj.query(false), 5);
    }

    #[test]
    fn a_binary_syncobj_has_no_points() {
        let syncobj = syncobj(true);
        assert_eq!((syncobj.query(false), syncobj.query(true)), (0, 0));
        assert!(syncobj.fence(0).unwrap().is_signaled());
        assert_eq!(syncobj.fence(1).err(), Some(Errno::EINVAL));
        syncobj.set(None);
        assert_eq!(syncobj.fence(0).err(), Some(Errno::EINVAL));
    }

    #[test]
    fn a_timeline_holds_only_so_many_points_that_are_not_signaled() {
        let syncobj = syncobj(false);
        let fence = Fence::pending(1, 1);
        for point in 1..=POINTS_MAX as u64 {
            syncobj.check_room().unwrap();
            syncobj.attach(point, fence.clone());
        }
        assert_eq!(syncobj.check_room(), Err(Errno::ENOMEM));
        fence.signal(Ok(()));
        syncobj.check_room().unwrap();
    }

    #[test]
    fn the_timelines_of_a_guest_hold_only_so_many_points_together() {
        let points = Arc::default();
        let fence = Fence::pending(1, 1);
        let full: Vec<_> = (0..ALL_POINTS_MAX / POINTS_MAX)
            .map(|_| {
                let syncobj = Syncobj::new(false, &points);
                for point in 1..=POINTS_MAX as u64 {
                    syncobj.check_room().unwrap();
                    syncobj.attach(point, fence.clone());
                }
                syncobj
            })
            .collect();
        let another = Syncobj::new(false, &points);
        assert_eq!(another.check_room(), Err(Errno::ENOMEM));
        drop(full);
        another.check_room().unwrap();
        assert_eq!(points.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_wait_for_thousands_of_points_that_stand_for_several_fences_is_refused() {
        let syncobj = syncobj(false);
        syncobj.attach(1, Fence::pending(1, 1));
        syncobj.attach(2, Fence::pending(2, 1));
        let what = Wait {
            all: true,
            for_submit: true,
            available: false,
        };
        let points = vec![(syncobj.clone(), 2); 4096];
        let waited = wait_points(&points, what, 0, &Cancel::new());
        assert_eq!(waited, Err(Errno::ENOMEM));
        let waited = wait_points(&points[..8], what, 0, &Cancel::new());
        assert_eq!(waited, Err(Errno::ETIME));
    }

    #[test]
    fn waiting_for_submission_ends_when_another_thread_attaches_a_fence() {
        let syncobj = syncobj(false);
        let what = Wait {
            all: true,
            for_submit: false,
            available: false,
        };
        let points = [(syncobj.clone(), 4)];
        let cancel = Cancel::new();
        let missing = wait_points(&points, what, u64::MAX, &cancel);
        assert_eq!(missing, Err(Errno::EINVAL));
        std::thread::scope(|scope| {
            scope.spawn(|| syncobj.attach(4, Fence::signaled()));
            let what = Wait {
                for_submit: true,
                ..what
            };
            assert_eq!(wait_points(&points, what, u64::MAX, &cancel), Ok(0));
        });
    }

    #[test]
    fn waiting_for_any_tells_which_and_waiting_for_availability_needs_no_signal() {
        let (idle, busy) = (syncobj(false), syncobj(false));
        busy.attach(1, Fence::pending(1, 1));
        let points = [(idle, 1), (busy, 1)];
        let mut what = Wait {
            all: false,
            for_submit: true,
            available: true,
        };
        let cancel = Cancel::new();
        assert_eq!(wait_points(&points, what, 0, &cancel), Ok(1));
        what.available = false;
        assert_eq!(wait_points(&points, what, 0, &cancel), Err(Errno::ETIME));
        what.all = true;
        assert_eq!(wait_points(&points, what, 0, &cancel), Err(Errno::ETIME));
    }
}
