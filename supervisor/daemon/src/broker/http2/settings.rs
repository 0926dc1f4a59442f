//! SETTINGS (RFC 9113, section 6.5): what a peer wants, and what it is told.

use super::{code::ConnectionError, frame::DEFAULT_MAX_SIZE};

/// The window that every stream begins with unless a setting says otherwise.
pub const DEFAULT_WINDOW: u32 = 65_535;
/// The largest window (section 6.9.1).
pub const MAX_WINDOW: u32 = (1 << 31) - 1;

const HEADER_TABLE_SIZE: u16 = 1;
const ENABLE_PUSH: u16 = 2;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const INITIAL_WINDOW_SIZE: u16 = 4;
const MAX_FRAME_SIZE: u16 = 5;
const MAX_HEADER_LIST_SIZE: u16 = 6;

/// What a peer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The largest table for what it decodes.
    pub header_table_size: u32,
    /// Streams that it lets be open at once.
    pub max_streams: u32,
    /// The window of its streams.
    pub stream_window: u32,
    /// The largest frame that it takes.
    pub max_frame_size: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            header_table_size: 4096,
            // Until it has spoken, what RFC 9113, section 6.5.2 advises every peer to allow.
            max_streams: 100,
            stream_window: DEFAULT_WINDOW,
            max_frame_size: DEFAULT_MAX_SIZE,
        }
    }
}

impl Settings {
    /// Takes over what a SETTINGS frame's payload says.
    ///
    /// # Errors
    /// When a value is not allowed.
    pub fn update(&mut self, payload: &[u8]) -> Result<(), ConnectionError> {
        if !payload.len().is_multiple_of(6) {
            return Err(ConnectionError::size("SETTINGS of a wrong size"));
        }
        for entry in payload.chunks_exact(6) {
            let &[a, b, w, x, y, z] = entry else { continue };
            let value = u32::from_be_bytes([w, x, y, z]);
            match u16::from_be_bytes([a, b]) {
                HEADER_TABLE_SIZE => self.header_table_size = value,
                ENABLE_PUSH if value > 1 => return Err(ConnectionError::protocol("ENABLE_PUSH is neither 0 nor 1")),
                MAX_CONCURRENT_STREAMS => self.max_streams = value,
                INITIAL_WINDOW_SIZE if value > MAX_WINDOW => {
                    return Err(ConnectionError::flow("INITIAL_WINDOW_SIZE over 2^31 - 1"));
                }
                INITIAL_WINDOW_SIZE => self.stream_window = value,
                MAX_FRAME_SIZE if !(DEFAULT_MAX_SIZE..1 << 24).contains(&value) => {
                    return Err(ConnectionError::protocol("MAX_FRAME_SIZE outside 2^14 to 2^24 - 1"));
                }
                MAX_FRAME_SIZE => self.max_frame_size = value,
                // Section 6.5.2: unknown settings are ignored. Push is never used, and lists are the peer's to refuse.
                _ => {}
            }
        }
        Ok(())
    }
}

/// What the other side is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Streams that it may have open; only servers say so.
    pub max_streams: Option<u32>,
    /// The window of its streams.
    pub stream_window: u32,
    /// The largest frame.
    pub max_frame_size: u32,
    /// The largest list of fields.
    pub max_header_list_size: u32,
}

impl Announced {
    /// The payload of a SETTINGS frame.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        let streams = match self.max_streams {
            Some(streams) => (MAX_CONCURRENT_STREAMS, streams),
            // Only a client can forbid push.
            None => (ENABLE_PUSH, 0),
        };
        let entries = [
            streams,
            (INITIAL_WINDOW_SIZE, self.stream_window),
            (MAX_FRAME_SIZE, self.max_frame_size),
            (MAX_HEADER_LIST_SIZE, self.max_header_list_size),
        ];
        entries.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()[..]].concat()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Announced, Settings};
    use crate::broker::http2::Code;

    #[test]
    fn what_is_announced_is_understood() {
        let announced = Announced {
            max_streams: Some(7),
            stream_window: 1 << 20,
            max_frame_size: 1 << 17,
            max_header_list_size: 1 << 15,
        };
        let mut settings = Settings::default();
        settings.update(&announced.payload()).unwrap();
        assert_eq!(
            settings,
            Settings { header_table_size: 4096, max_streams: 7, stream_window: 1 << 20, max_frame_size: 1 << 17 }
        );
    }

    #[test]
    fn what_is_not_allowed_is_refused() {
        let wrong = |payload: &[u8]| Settings::default().update(payload).unwrap_err().code;
        assert_eq!(wrong(&[0; 5]), Code::FRAME_SIZE_ERROR);
        assert_eq!(wrong(&[0, 2, 0, 0, 0, 2]), Code::PROTOCOL_ERROR);
        assert_eq!(wrong(&[0, 4, 0x80, 0, 0, 0]), Code::FLOW_CONTROL_ERROR);
        assert_eq!(wrong(&[0, 5, 0, 0, 0, 1]), Code::PROTOCOL_ERROR);
        assert_eq!(wrong(&[0, 5, 1, 0, 0, 0]), Code::PROTOCOL_ERROR);
    }
}
