//! The `grpc-timeout` header: at most eight digits and a unit ("gRPC over HTTP/2", "Timeout").

use std::time::Duration;

/// A timeout that is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grpc-timeout must be 1 to 8 digits and one of H, M, S, m, u, n")]
pub(super) struct BadTimeout;

/// Reads a caller's timeout.
pub(super) fn parse(value: &[u8]) -> Result<Duration, BadTimeout> {
    let (unit, digits) = value.split_last().ok_or(BadTimeout)?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(BadTimeout);
    }
    let number = digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Ok(Duration::from_secs(number * 3600)),
        b'M' => Ok(Duration::from_secs(number * 60)),
        b'S' => Ok(Duration::from_secs(number)),
        b'm' => Ok(Duration::from_millis(number)),
        b'u' => Ok(Duration::from_micros(number)),
        b'n' => Ok(Duration::from_nanos(number)),
        _ => Err(BadTimeout),
    }
}

/// Writes the time that remains, in the finest unit that fits; a remainder of a unit is cut off, so that the next one
/// on the way never gets more than there is.
pub(super) fn format(remaining: Duration) -> Text {
    const FIT: u128 = 100_000_000;
    let (number, unit) = if remaining.as_micros() < FIT {
        (remaining.as_micros(), b'u')
    } else if remaining.as_millis() < FIT {
        (remaining.as_millis(), b'm')
    } else {
        (u128::from(remaining.as_secs()).min(FIT - 1), b'S')
    };
    let mut number = u32::try_from(number).unwrap_or(99_999_999);
    let mut text = [0; 9];
    text[8] = unit;
    let mut start = 8;
    loop {
        start -= 1;
        text[start] = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
        if number == 0 || start == 0 {
            break;
        }
    }
    Text { text, start }
}

/// The value of a `grpc-timeout`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    text: [u8; 9],
    start: usize,
}

impl Text {
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.text[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{format, parse};

    #[test]
    fn every_unit_is_read() {
        for (text, expected) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "S", "1", "1s", "-1S", "1.5S", "123456789m", " 1S"] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn what_does_not_fit_is_cut() {
        assert_eq!(format(Duration::MAX).as_bytes(), b"99999999S");
        assert_eq!(format(Duration::ZERO).as_bytes(), b"0u");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_and_never_longer(nanos in 0u64..90_000_000_000_000_000) {
            let duration = Duration::from_nanos(nanos);
            let read = parse(format(duration).as_bytes()).unwrap();
            prop_assert!(read <= duration);
            prop_assert!(duration.saturating_sub(read) < Duration::from_secs(1));
        }
    }
}
