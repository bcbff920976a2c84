//! The guest's limits as people set them on the command line: `--limit memory=1G,objects=100`.
//!
//! Programs parse their options with it; it must never guess. What each limit means is `docs/protocol.md`'s.

use std::time::Duration;

use crate::device::DeviceConfig;
use crate::limit::Limit;

use crate::size;

/// Fewer bytes than this do not hold the messages that every session needs (the hello and its answer).
const MESSAGE_MIN: u64 = 8192;

/// One limit and its value: bytes, a number, or milliseconds per second for `worker_time`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    limit: Limit,
    value: u64,
}

/// Why a text sets no limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Not `NAME=VALUE`.
    #[error("write NAME=VALUE, such as memory=1G; the names are {}", names())]
    Form,
    /// No such name.
    #[error("there is no limit '{name}'; the names are {}", names())]
    Name {
        /// What was asked for.
        name: String,
    },
    /// Not a number.
    #[error(transparent)]
    Value(size::SizeError),
    /// A number out of range.
    #[error("'{}' goes from {least} to {most}", .limit.name())]
    Range {
        /// Which limit.
        limit: Limit,
        /// Its least value.
        least: u64,
        /// Its greatest value.
        most: u64,
    },
}

fn names() -> String {
    Limit::ALL.map(Limit::name).join(", ")
}

impl Setting {
    /// Reads `NAME=VALUE`; the value may have a suffix as sizes have ([`size::parse`]).
    ///
    /// # Errors
    ///
    /// [`SettingError`] when there is no such limit or it cannot have this value.
    pub fn parse(text: &str) -> Result<Self, SettingError> {
        let (name, value) = text.split_once('=').ok_or(SettingError::Form)?;
        let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
        let limit = limit.ok_or_else(|| SettingError::Name { name: name.into() })?;
        let value = size::parse(value).map_err(SettingError::Value)?;
        let (least, most) = match limit {
            Limit::Message => (MESSAGE_MIN, u32::MAX.into()),
            Limit::Objects | Limit::InFlight | Limit::Handles => (0, u32::MAX.into()),
            Limit::WorkerTime => (1, 1_000_000),
            Limit::Mapped | Limit::Memory => (0, u64::MAX),
        };
        match (least..=most).contains(&value) {
            true => Ok(Self { limit, value }),
            false => Err(SettingError::Range { limit, least, most }),
        }
    }

    /// Sets it.
    pub fn apply(self, device: &mut DeviceConfig) {
        let Self { limit, value } = self;
        let count = u32::try_from(value).unwrap_or(u32::MAX);
        let limits = &mut device.limits;
        match limit {
            Limit::Message => limits.message = count,
            Limit::Objects => limits.objects = count,
            Limit::InFlight => limits.in_flight = count,
            Limit::Mapped => limits.mapped = value,
            Limit::Memory => limits.memory = value,
            Limit::Handles => limits.handles = count,
            Limit::WorkerTime => device.worker_time = Duration::from_millis(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;

    #[test]
    fn every_limit_can_be_set() {
        let mut device = DeviceConfig::default();
        let text = "message=8K objects=2 in_flight=3 mapped=4M memory=5G handles=6 worker_time=700";
        for setting in text.split(' ') {
            Setting::parse(setting).unwrap().apply(&mut device);
        }
        let limits = Limits {
            message: 8192,
            objects: 2,
            in_flight: 3,
            mapped: 4 << 20,
            memory: 5 << 30,
            handles: 6,
        };
        assert_eq!(device.limits, limits);
        assert_eq!(device.worker_time, Duration::from_millis(700));
    }

    #[test]
    fn what_sets_no_limit_is_refused_with_the_remedy() {
        for (text, remedy) in [
            ("memory", "NAME=VALUE"),
            ("", "NAME=VALUE"),
            ("files=3", "objects"),
            ("memory=1Q", "256M"),
            ("memory=", "256M"),
            ("objects=4G", "from 0 to 4294967295"),
            ("message=100", "from 8192"),
            ("worker_time=0", "from 1 to 1000000"),
        ] {
            let error = Setting::parse(text).unwrap_err().to_string();
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }
}
