//! Times and sizes as people read them.

use std::time::{Duration, SystemTime};

use prost_types::Timestamp;

/// RFC 3339 in UTC with milliseconds, such as `2026-11-23T05:30:41.123Z`.
pub(crate) fn moment(at: Option<Timestamp>) -> String {
    let Some(mut at) = at else { return "-".to_owned() };
    at.normalize();
    let milliseconds = at.nanos / 1_000_000;
    at.nanos = 0;
    let text = at.to_string();
    match text.strip_suffix('Z') {
        Some(seconds) => format!("{seconds}.{milliseconds:03}Z"),
        None => text,
    }
}

/// How long ago, such as `3m12s`; `-` when the time is missing.
pub(crate) fn age(at: Option<Timestamp>, now: SystemTime) -> String {
    match at.and_then(|at| SystemTime::try_from(at).ok()) {
        // A clock that was set back makes times of the future; "now" is the nearest truth.
        Some(at) => coarse(now.duration_since(at).unwrap_or_default()),
        None => "-".to_owned(),
    }
}

/// The two largest units, such as `2d4h`, `3m12s`, `45s`.
pub(crate) fn coarse(time: Duration) -> String {
    const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let seconds = time.as_secs();
    let Some(largest) = UNITS.iter().position(|(_, length)| seconds >= *length) else { return "0s".to_owned() };
    let (unit, length) = UNITS[largest];
    let mut text = format!("{}{unit}", seconds / length);
    if let Some((unit, smaller)) = UNITS.get(largest + 1).filter(|(_, smaller)| seconds % length / smaller > 0) {
        text.push_str(&format!("{}{unit}", seconds % length / smaller));
    }
    text
}

/// A span to a tenth of a second, such as `0.4 s`.
pub(crate) fn span(time: prost_types::Duration) -> String {
    let time = Duration::try_from(time).unwrap_or_default();
    if time < Duration::from_secs(60) { format!("{:.1} s", time.as_secs_f64()) } else { coarse(time) }
}

/// Bytes in binary units, such as `12.3 MiB`; `-` for 0, which stands for "not known".
#[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    match bytes {
        0 => "-".to_owned(),
        1..1024 => format!("{bytes} B"),
        _ => {
            let mut value = bytes as f64 / 1024.0;
            let mut unit = 0;
            while value >= 1024.0 && unit + 1 < UNITS.len() {
                value /= 1024.0;
                unit += 1;
            }
            format!("{value:.1} {}", UNITS[unit])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_three_decimals() {
        let at = |seconds, nanos| moment(Some(Timestamp { seconds, nanos }));
        assert_eq!(at(1_700_000_000, 5_000_000), "2023-11-14T22:13:20.005Z");
        assert_eq!(at(1_700_000_000, 0), "2023-11-14T22:13:20.000Z");
        assert_eq!(moment(None), "-");
    }

    #[test]
    fn spans_show_two_units() {
        assert_eq!(coarse(Duration::from_secs(0)), "0s");
        assert_eq!(coarse(Duration::from_secs(59)), "59s");
        assert_eq!(coarse(Duration::from_secs(192)), "3m12s");
        assert_eq!(coarse(Duration::from_secs(2 * 86_400 + 4 * 3_600 + 7)), "2d4h");
        assert_eq!(coarse(Duration::from_secs(86_400)), "1d");
        assert_eq!(span(prost_types::Duration { seconds: 0, nanos: 412_000_000 }), "0.4 s");
    }

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(bytes(0), "-");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(12_900_000), "12.3 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
