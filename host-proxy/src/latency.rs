//! How long requests take: a histogram that any thread adds to without a lock, and what it says at one moment.
//!
//! [`crate::statistics`] has one for requests that are answered at once and one for those that wait. Buckets are a quarter of
//! a power of two wide, from 128 ns to a minute, so a percentile is at most a quarter too high.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Everything below this power of two of nanoseconds is in the first bucket.
const FIRST: u32 = 7;
/// From this one on, everything is in the last.
const LAST: u32 = 36;
/// Buckets of a power of two, as a power of two.
const SPLIT: u32 = 2;

const BUCKETS: usize = 2 + ((LAST - FIRST) << SPLIT) as usize;

/// Durations as they come in.
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Adds what began then and ends now.
    #[cold]
    #[inline(never)]
    pub(crate) fn record_since(&self, begin: Instant) {
        self.record(begin.elapsed());
    }

    pub(crate) fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket(nanoseconds)) {
            bucket.fetch_add(1, Ordering::Relaxed);
            self.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> Latency {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Latency {
            sum_ns: load(&self.sum_ns),
            buckets: self.buckets.iter().map(load).collect(),
        }
    }
}

/// The bucket of a duration.
fn bucket(nanoseconds: u64) -> usize {
    let power = match nanoseconds.checked_ilog2() {
        Some(power) if power >= LAST => return BUCKETS - 1,
        Some(power) if power >= FIRST => power,
        _ => return 0,
    };
    // The bits behind the first one say which of the power's buckets it is.
    let part = (nanoseconds >> (power - SPLIT)) & ((1 << SPLIT) - 1);
    let before = usize::try_from((power - FIRST) << SPLIT).unwrap_or(BUCKETS);
    1 + before + usize::try_from(part).unwrap_or(0)
}

/// The first duration behind a bucket, in nanoseconds; for the last one, where it begins.
fn end(bucket: usize) -> u64 {
    let after_first = u32::try_from(bucket.min(BUCKETS - 2)).unwrap_or(0);
    let power = FIRST + (after_first >> SPLIT);
    let parts = (1 << SPLIT) + u64::from(after_first & ((1 << SPLIT) - 1));
    parts << (power - SPLIT)
}

/// How long requests have taken until one moment: for people and in JSON as count, mean and percentiles in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    sum_ns: u64,
    /// None at all, or [`BUCKETS`].
    buckets: Vec<u64>,
}

impl Latency {
    /// How many requests were timed.
    pub fn count(&self) -> u64 {
        self.buckets.iter().copied().fold(0, u64::saturating_add)
    }

    /// How long all of them took together.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns)
    }

    /// A duration that this share of the requests (0 to 1) did not exceed, at most a quarter too high, and at most 69 s.
    /// `None` if there were no requests.
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // from 0 to the count
        let rank = (share.clamp(0.0, 1.0) * count as f64).ceil() as u64;
        let mut so_far = 0u64;
        let found = self.buckets.iter().position(|bucket| {
            so_far = so_far.saturating_add(*bucket);
            so_far >= rank.max(1)
        });
        Some(Duration::from_nanos(end(found?)))
    }

    /// Those of these requests that came after an earlier moment.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets = self.buckets.iter().zip(before);
        Self {
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
            buckets: buckets
                .map(|(now, before)| now.saturating_sub(before))
                .collect(),
        }
    }

    /// For each power of two from 128 ns to 69 s, how many requests took less.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> {
        let mut so_far = 0u64;
        let buckets = self.buckets.iter().take(BUCKETS - 1).enumerate();
        buckets.filter_map(move |(index, count)| {
            so_far = so_far.saturating_add(*count);
            let whole = index.is_multiple_of(1 << SPLIT);
            whole.then_some((Duration::from_nanos(end(index)), so_far))
        })
    }
}

/// What people see of it.
#[derive(Serialize)]
struct Summary {
    count: u64,
    mean_ns: u64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
}

impl Serialize for Latency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return (self.sum_ns, &self.buckets).serialize(serializer);
        }
        let percentile = |share| {
            let duration = self.percentile(share).unwrap_or_default();
            u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
        };
        let count = self.count();
        let summary = Summary {
            count,
            mean_ns: self.sum_ns.checked_div(count).unwrap_or(0),
            p50_ns: percentile(0.5),
            p90_ns: percentile(0.9),
            p99_ns: percentile(0.99),
            p999_ns: percentile(0.999),
        };
        summary.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Latency {
    /// From what is not for people.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (sum_ns, buckets): (u64, Vec<u64>) = Deserialize::deserialize(deserializer)?;
        match buckets.len() {
            0 | BUCKETS => Ok(Self { sum_ns, buckets }),
            other => Err(de::Error::invalid_length(other, &"all buckets or none")),
        }
    }
}

#[cfg(test)]
impl Latency {
    /// The longest in a record.
    pub(crate) fn greatest() -> Self {
        Self {
            sum_ns: u64::MAX,
            buckets: vec![u64::MAX; BUCKETS],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_a_bucket_that_ends_at_most_a_quarter_behind_it() {
        let mut samples: Vec<u64> = (0..64).map(|bit| 1 << bit).collect();
        samples.extend((0..64).flat_map(|bit| [(1 << bit) - 1, (1 << bit) + (1 << bit) / 3]));
        samples.extend(0..5000);
        for nanoseconds in samples {
            let index = bucket(nanoseconds);
            assert!(index < BUCKETS, "{nanoseconds}");
            if nanoseconds >= 1 << LAST {
                assert_eq!((index, end(index)), (BUCKETS - 1, 1 << LAST));
                continue;
            }
            assert!(end(index) > nanoseconds, "{nanoseconds}: {}", end(index));
            let begin = if index == 0 { 0 } else { end(index - 1) };
            assert!(begin <= nanoseconds, "{nanoseconds}: {begin}");
            let most = (nanoseconds + nanoseconds / 4 + 1).max(1 << FIRST);
            assert!(end(index) <= most, "{nanoseconds}: {}", end(index));
        }
    }

    #[test]
    fn percentiles_are_those_of_the_durations_and_at_most_a_quarter_higher() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|micros| histogram.record(Duration::from_micros(micros)));
        let latency = histogram.read();
        assert_eq!(latency.count(), 1000);
        assert_eq!(latency.sum(), Duration::from_micros(500_500));
        for (share, exact) in [(0.5, 500), (0.9, 900), (0.99, 990), (0.999, 999), (0.0, 1)] {
            let exact = Duration::from_micros(exact);
            let found = latency.percentile(share).unwrap();
            assert!(
                found > exact && found <= exact * 5 / 4,
                "{share}: {found:?}"
            );
        }
        assert_eq!(Latency::default().percentile(0.5), None);
        assert_eq!(Histogram::default().read().percentile(0.5), None);
    }

    #[test]
    fn what_came_since_an_earlier_moment_is_the_difference() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_secs(1));
        let earlier = histogram.read();
        histogram.record(Duration::from_micros(1));
        let since = histogram.read().since(&earlier);
        assert_eq!((since.count(), since.sum()), (1, Duration::from_micros(1)));
        assert!(since.percentile(1.0).unwrap() < Duration::from_micros(2));
        // A proxy that has started anew has fewer than before.
        assert_eq!(earlier.since(&histogram.read()).count(), 0);
        assert_eq!(earlier.since(&Latency::default()), earlier);
    }

    #[test]
    fn cumulative_buckets_never_fall_and_lack_only_what_took_longer_than_all_of_them() {
        let histogram = Histogram::default();
        for nanoseconds in [1, 127, 128, 200, 300, 1 << 35, 1 << 36, u64::MAX] {
            histogram.record(Duration::from_nanos(nanoseconds));
        }
        let all: Vec<_> = histogram.read().cumulative().collect();
        let counts = |index: usize| (all[index].0.as_nanos(), all[index].1);
        assert_eq!(counts(0), (128, 2));
        assert_eq!(counts(1), (256, 4));
        assert_eq!(counts(2), (512, 5));
        assert_eq!(counts(all.len() - 1), (1 << 36, 6));
        assert_eq!(all.len(), 30);
        assert!(
            all.windows(2)
                .all(|pair| pair[0].0 * 2 == pair[1].0 && pair[0].1 <= pair[1].1)
        );
    }
}
