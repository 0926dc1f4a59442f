//! Header compression for HTTP/2 (RFC 7541).
//!
//! It turns blocks of bytes into field lists and back, and keeps the two dynamic tables of a connection. It does not
//! know frames, nor which fields mean what. Everything that a peer sends is bounded: the table by its size, a list by
//! the limit that the caller passes, an integer by 2²⁸.

mod decoder;
mod encoder;
mod huffman;
mod integer;
mod table;

pub use decoder::{Decoded, Decoder};
pub use encoder::Encoder;

/// What is wrong with a block. Each ends the connection (RFC 9113, section 4.3): the tables no longer agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    /// The block ends within a field.
    #[error("a header block ends within a field")]
    Truncated,
    /// An integer is larger than anything that is allowed here.
    #[error("a header block has an integer without bound")]
    Integer,
    /// No table has a field of this index.
    #[error("a header block names a field that no table has")]
    Index,
    /// A string is not Huffman code, or is padded wrongly.
    #[error("a header block has a string that is not Huffman code")]
    Huffman,
    /// A table size beyond what was announced, or not at the beginning of a block.
    #[error("a header block sets a table size that is not allowed there")]
    TableSize,
}
