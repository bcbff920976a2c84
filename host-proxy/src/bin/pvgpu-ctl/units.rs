//! Sizes and durations as people write and read them.

use std::time::Duration;

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// A number of bytes, with K, M, G or T behind it for powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let mut suffixes = SUFFIXES.into_iter();
    let suffixed = suffixes.find_map(|(suffix, shift)| Some((text.strip_suffix(suffix)?, shift)));
    let (digits, shift) = suffixed.unwrap_or((text, 0));
    let number = digits.parse::<u64>().ok();
    let size = number.and_then(|number| number.checked_mul(1 << shift));
    size.ok_or_else(|| format!("'{text}' is not a size; write one such as 256M or 1G"))
}

/// Seconds, with a fraction, from a hundredth to a day.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let seconds = seconds.filter(|seconds| (0.01..=86_400.0).contains(seconds));
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| format!("'{text}' is not from 0.01 to 86400 seconds"))
}

/// A size for people: three or four digits and a unit.
pub(crate) fn size(bytes: u64) -> String {
    let fitting = SUFFIXES
        .into_iter()
        .rev()
        .find(|(_, shift)| bytes >> shift > 0);
    match fitting {
        Some((suffix, shift)) => format!("{:.1}{suffix}", bytes as f64 / (1u64 << shift) as f64),
        None => bytes.to_string(),
    }
}

/// A duration for people; a dash for none.
pub(crate) fn duration(duration: Option<Duration>) -> String {
    let Some(duration) = duration else {
        return "-".to_owned();
    };
    let nanoseconds = duration.as_nanos() as f64;
    match nanoseconds {
        ..1e3 => format!("{nanoseconds}ns"),
        ..1e6 => format!("{:.1}us", nanoseconds / 1e3),
        ..1e9 => format!("{:.1}ms", nanoseconds / 1e6),
        _ => format!("{:.1}s", nanoseconds / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_powers_of_1024_and_nothing_else() {
        for (text, size) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("256M", 256 << 20),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(size));
        }
        for text in ["", "K", "1Q", "-1", "1KK", "17000000T", "1.5G"] {
            assert!(parse_size(text).unwrap_err().contains("256M"), "{text}");
        }
    }

    #[test]
    fn an_interval_is_neither_nothing_nor_endless() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "inf", "1e9", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!(
            (size(0), size(1023), size(1536)),
            ("0".into(), "1023".into(), "1.5K".into())
        );
        assert_eq!(size(4 << 30), "4.0G");
        let text = |nanoseconds| duration(Some(Duration::from_nanos(nanoseconds)));
        assert_eq!((text(128), text(1500)), ("128ns".into(), "1.5us".into()));
        assert_eq!(
            (text(2_000_000), text(3_000_000_000)),
            ("2.0ms".into(), "3.0s".into())
        );
        assert_eq!(duration(None), "-");
    }
}
