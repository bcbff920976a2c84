//! The limits of a guest by name: the errno of each, and the budget of worker time.
//!
//! The module `session` holds requests against them, [`crate::statistics`] counts how often each was reached. Their
//! values are [`pvgpu_protocol::control::Limits`] and [`crate::device::DeviceConfig::worker_time`]; nothing here knows of
//! requests.

use crate::clock::thread_ns;
use pvgpu_protocol::Errno;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a guest can have too much of. Each is described with its value, in `Limits` or `DeviceConfig`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Bytes of a message, or elements of one of its arrays.
    Message,
    /// Open files and other objects.
    Objects,
    /// Requests that may wait.
    InFlight,
    /// Bytes mapped into the aperture.
    Mapped,
    /// Bytes of GPU memory.
    Memory,
    /// GEM and syncobj handles.
    Handles,
    /// Processor time of requests that may wait.
    WorkerTime,
}

impl Limit {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 7] = [
        Self::Message,
        Self::Objects,
        Self::InFlight,
        Self::Mapped,
        Self::Memory,
        Self::Handles,
        Self::WorkerTime,
    ];

    /// As the documentation, statistics and options call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Objects => "objects",
            Self::InFlight => "in_flight",
            Self::Mapped => "mapped",
            Self::Memory => "memory",
            Self::Handles => "handles",
            Self::WorkerTime => "worker_time",
        }
    }

    /// What the guest gets that reaches it. (A chain that is longer than `message` is no request and gets nothing, a
    /// `read` that is longer gets `EINVAL`.)
    pub fn errno(self) -> Errno {
        match self {
            Self::Message => Errno::E2BIG,
            Self::Objects => Errno::EMFILE,
            Self::InFlight | Self::WorkerTime => Errno::EAGAIN,
            Self::Mapped | Self::Memory | Self::Handles => Errno::ENOMEM,
        }
    }
}

/// Time that flows in steadily and is spent: what is left never exceeds the income of a second, and a debt has to be
/// paid off before anything more is spent.
pub(crate) struct Budget {
    /// Nanoseconds of income in a second.
    income: i64,
    account: Mutex<Account>,
}

struct Account {
    left: i64,
    /// Until when the income is booked.
    at: Instant,
}

impl Budget {
    /// A full budget with an income of `time` every second.
    pub(crate) fn new(time: Duration) -> Self {
        let income = i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        Self {
            income,
            account: Mutex::new(Account {
                left: income,
                at: Instant::now(),
            }),
        }
    }

    /// Whether anything is left.
    pub(crate) fn is_left(&self) -> bool {
        self.account_at(Instant::now()).left > 0
    }

    /// Does `work` and spends the processor time that it takes on this thread, whether that is left or not.
    pub(crate) fn spend_on<T>(&self, work: impl FnOnce() -> T) -> T {
        let begin = thread_ns();
        let result = work();
        self.spend(thread_ns().saturating_sub(begin));
        result
    }

    fn spend(&self, nanoseconds: u64) {
        let spent = i64::try_from(nanoseconds).unwrap_or(i64::MAX);
        let mut account = self.account_at(Instant::now());
        account.left = account.left.saturating_sub(spent);
    }

    /// The account with the income until now.
    fn account_at(&self, now: Instant) -> MutexGuard<'_, Account> {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(account.at).as_nanos();
        let income =
            i128::from(self.income).saturating_mul(i128::try_from(passed).unwrap_or(i128::MAX));
        let income = i64::try_from(income / 1_000_000_000).unwrap_or(i64::MAX);
        // Less than a nanosecond of income is not lost: it is booked when it has become one.
        if income > 0 {
            account.left = account.left.saturating_add(income).min(self.income);
            account.at = now;
        }
        account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_used_up_and_comes_back_with_time() {
        let budget = Budget::new(Duration::from_millis(500));
        let start = budget.account.lock().unwrap().at;
        let left = |after: u64| budget.account_at(start + Duration::from_millis(after)).left;
        budget.account_at(start).left -= 1_500_000_000;
        assert_eq!(left(0), -1_000_000_000);
        assert_eq!(left(1000), -500_000_000);
        assert_eq!(left(2100), 50_000_000);
        assert_eq!(
            left(60_000),
            500_000_000,
            "no more than a second's is saved up"
        );
    }

    #[test]
    fn a_budget_of_nothing_is_never_left() {
        assert!(!Budget::new(Duration::ZERO).is_left());
        assert!(Budget::new(Duration::MAX).is_left());
    }
}
