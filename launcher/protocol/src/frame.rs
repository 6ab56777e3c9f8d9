//! Frames: a big-endian `u32` of length, then that many bytes of JSON `{"v": version, "m": …}`.
//!
//! A length over [`MAX_FRAME_BYTES`] is refused before anything is allocated, and another version
//! is refused before its message is read.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};

/// Version of the messages; both sides come from one build, so any difference is a mistake.
pub const VERSION: u32 = 2;

/// Most bytes in one frame's body.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

/// Bytes of the length in front of each frame.
pub const HEADER_BYTES: usize = 4;

/// Why a frame could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed.
    #[error("control socket: {0}")]
    Io(#[from] std::io::Error),
    /// The peer closed the socket inside a frame.
    #[error("the control socket closed inside a frame")]
    Torn,
    /// The frame is longer than the limit.
    #[error("a control frame of {bytes} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLong {
        /// Length that was sent or asked for.
        bytes: usize,
    },
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {found} of the rank protocol, this binary {VERSION}: \
         `phalanx` and `phalanx-trainer` are of different builds"
    )]
    Version {
        /// The peer's version.
        found: u32,
    },
    /// The body is no message.
    #[error("a control frame is no message: {0}")]
    Malformed(#[from] serde_json::Error),
}

#[derive(Serialize)]
struct EnvelopeOut<'a, M> {
    v: u32,
    m: &'a M,
}

#[derive(Deserialize)]
struct VersionOnly {
    v: u32,
}

#[derive(Deserialize)]
struct EnvelopeIn<M> {
    m: M,
}

/// The bytes of one frame, header included.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut frame, &EnvelopeOut { v: VERSION, m: message })?;
    let bytes = frame.len() - HEADER_BYTES;
    let length = checked_length(bytes)?;
    frame[..HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// The message in one frame's body.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, FrameError> {
    let VersionOnly { v } = serde_json::from_slice(body)?;
    if v != VERSION {
        return Err(FrameError::Version { found: v });
    }
    let EnvelopeIn { m } = serde_json::from_slice(body)?;
    Ok(m)
}

/// Writes one message.
pub fn write<M: Serialize>(writer: &mut impl Write, message: &M) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?)?;
    Ok(writer.flush()?)
}

/// Reads one message; `None` at the end of the stream, if that is between two frames.
pub fn read<M: DeserializeOwned>(reader: &mut impl Read) -> Result<Option<M>, FrameError> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match reader.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Torn),
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_be_bytes(header) as usize;
    checked_length(length)?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => FrameError::Torn,
        _ => FrameError::Io(error),
    })?;
    decode(&body).map(Some)
}

/// Cuts frames out of bytes as they arrive, for a reader that must not block.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes in bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes come.
    pub fn next_message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*header) as usize;
        checked_length(length)?;
        let end = HEADER_BYTES + length;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let message = decode(&self.buffer[HEADER_BYTES..end]);
        self.buffer.drain(..end);
        message.map(Some)
    }
}

fn checked_length(bytes: usize) -> Result<u32, FrameError> {
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes });
    }
    u32::try_from(bytes).map_err(|_| FrameError::TooLong { bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{FromRank, StepReport};
    use proptest::prelude::*;

    fn check_refused(bytes: &[u8], expected: &str) {
        let from_stream = read::<FromRank>(&mut &bytes[..]).unwrap_err().to_string();
        assert!(from_stream.contains(expected), "{from_stream:?} lacks {expected:?}");
    }

    fn framed(body: &str) -> Vec<u8> {
        [&(body.len() as u32).to_be_bytes()[..], body.as_bytes()].concat()
    }

    #[test]
    fn hostile_frames_are_refused() {
        check_refused(&u32::MAX.to_be_bytes(), "over the limit of 1048576");
        check_refused(&(MAX_FRAME_BYTES as u32 + 1).to_be_bytes(), "over the limit");
        check_refused(&[0, 0], "closed inside a frame");
        check_refused(&[0, 0, 0, 9, b'{'], "closed inside a frame");
        check_refused(&framed("{"), "no message");
        check_refused(&framed(r#"{"v":7,"m":{"unknown":1}}"#), "speaks version 7");
        check_refused(&framed(r#"{"v":2,"m":{"unknown":1}}"#), "no message");
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_be_bytes());
        assert!(matches!(decoder.next_message::<FromRank>(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn an_overlong_message_is_refused_by_its_sender() {
        let message = FromRank::Finished { step: 1 };
        assert!(encode(&message).is_ok());
        let long = "x".repeat(MAX_FRAME_BYTES);
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn the_end_between_frames_is_no_error() {
        assert!(read::<FromRank>(&mut &[][..]).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_messages(
            steps in prop::collection::vec((0..u64::MAX, prop::num::f64::ANY), 1..20),
            piece in 1_usize..200,
        ) {
            let messages: Vec<FromRank> = steps
                .into_iter()
                .map(|(step, loss)| {
                    FromRank::Step(Box::new(StepReport { step, loss, ..StepReport::default() }))
                })
                .collect();
            let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();
            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message::<FromRank>().unwrap() {
                    decoded.push(message);
                }
            }
            // NaN differs from itself, so compare what both print as.
            prop_assert_eq!(
                serde_json::to_string(&decoded).unwrap(),
                serde_json::to_string(&messages).unwrap()
            );
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = read::<FromRank>(&mut &bytes[..]);
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let _ = decoder.next_message::<FromRank>();
        }
    }
}
