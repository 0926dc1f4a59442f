//! Until when an approval holds: a date or a moment of RFC 3339 in the policy file. The clock is the caller's.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use toml::value::{Date, Datetime, Offset, Time};

/// The first moment at which it no longer holds. A date alone is the beginning of that day, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expiry {
    /// Seconds since 1970.
    at: i64,
}

impl Expiry {
    /// A clock that is before 1970 tells nothing, and then nothing holds.
    pub(crate) fn is_over(self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).ok().and_then(|now| i64::try_from(now.as_secs()).ok());
        now.is_none_or(|now| now >= self.at)
    }

    fn of(written: &Datetime) -> Option<Self> {
        let Datetime { date, time, offset } = written;
        let Date { year, month, day } = (*date)?;
        let days = days(i64::from(year), i64::from(month), i64::from(day));
        let seconds = match (time, offset) {
            (None, None) => 0,
            (Some(Time { hour, minute, second, .. }), Some(offset)) => {
                let east = match offset {
                    Offset::Z => 0,
                    Offset::Custom { minutes } => i64::from(*minutes),
                };
                (i64::from(*hour) * 60 + i64::from(*minute) - east) * 60 + i64::from(second.unwrap_or(0))
            }
            // Somebody's local time: whose?
            (Some(_), None) | (None, Some(_)) => return None,
        };
        Some(Self { at: days * 86_400 + seconds })
    }
}

/// Days since 1970-01-01 of a date in the Gregorian calendar: the years begin in March, so that the leap day ends them.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Datetime::deserialize(deserializer)?;
        Self::of(&written).ok_or_else(|| {
            serde::de::Error::custom(
                "expires is a date, or a moment with its offset, such as 2027-01-31 or 2027-01-31T12:00:00Z",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(text: &str) -> Option<i64> {
        Expiry::of(&text.parse().expect("a date")).map(|expiry| expiry.at)
    }

    #[test]
    fn dates_and_moments_are_read() {
        for (text, expected) in [
            ("1970-01-01", Some(0)),
            ("2000-03-01", Some(951_868_800)),
            ("2024-02-29", Some(1_709_164_800)),
            ("2027-01-31T12:00:00Z", Some(1_801_396_800)),
            ("2027-01-31T14:00:00+02:00", Some(1_801_396_800)),
            ("2027-01-31T12:00:00", None),
            ("12:00:00", None),
        ] {
            assert_eq!(at(text), expected, "{text}");
        }
    }

    #[test]
    fn it_is_over_from_that_moment_on() {
        let expiry = Expiry { at: 1000 };
        let now = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(!expiry.is_over(now(999)));
        assert!(expiry.is_over(now(1000)));
        assert!(expiry.is_over(UNIX_EPOCH - Duration::from_secs(1)), "a clock that is wrong");
    }
}
