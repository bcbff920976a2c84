//! Sizes as people write them on the command line: `256M`, `1G`, `4096`.
//!
//! Programs parse their options with it; it must never guess (a suffix it does not know is an error).

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a size: write a whole number of bytes or one with K, M, G or T, such as 256M"
)]
pub struct SizeError(String);

/// Reads a number of bytes with an optional binary suffix K, M, G or T (either case).
///
/// # Errors
///
/// [`SizeError`] when the text is not such a number or the product exceeds 64 bits.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let error = || SizeError(text.to_string());
    let (digits, shift) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let shift = match suffix.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(error()),
            };
            (text.get(..at).ok_or_else(error)?, shift)
        }
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// Writes a size the way [`parse`] reads it, with the largest suffix that loses nothing.
pub fn display(bytes: u64) -> String {
    for (shift, suffix) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_multiples() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("4K"), Ok(4096));
        assert_eq!(parse("256m"), Ok(256 << 20));
        assert_eq!(parse("1G"), Ok(1 << 30));
        assert_eq!(parse("2T"), Ok(2 << 40));
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in [
            "",
            "M",
            "12Q",
            "1.5G",
            "-1",
            "+1",
            " 1",
            "1 ",
            "0x10",
            "99999999999T",
            "256MB",
            "é",
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("256M"), "{message}");
        }
    }

    #[test]
    fn displayed_sizes_parse_back() {
        for bytes in [0, 1, 1023, 4096, 6 << 20, 3 << 30, 1 << 41] {
            assert_eq!(parse(&display(bytes)), Ok(bytes));
        }
    }
}
