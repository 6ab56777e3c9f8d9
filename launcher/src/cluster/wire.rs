//! Frames of messages over an encrypted connection.

use rank_protocol::frame::{self, FrameError, HEADER_BYTES, MAX_FRAME_BYTES};
use rank_protocol::session::Numbered;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Frames that wait to be written; with more, the other side counts as gone.
pub const NUM_QUEUED: usize = 4096;
/// Longest time the other side may leave what was written unread.
pub const WRITE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

fn invalid(error: FrameError) -> Error {
    Error::new(ErrorKind::InvalidData, error.to_string())
}

/// Reads one message of at most `limit` bytes.
///
/// # Errors
/// Where the connection ends or what came is no message.
pub async fn read<M: DeserializeOwned>(
    reader: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<M> {
    let mut header = [0; HEADER_BYTES];
    reader.read_exact(&mut header).await?;
    let bytes = u32::from_be_bytes(header) as usize;
    if bytes > limit.min(MAX_FRAME_BYTES) {
        let limit = limit.min(MAX_FRAME_BYTES);
        let what = format!("a frame of {bytes} bytes is over the limit of {limit}");
        return Err(Error::new(ErrorKind::InvalidData, what));
    }
    let mut body = vec![0; bytes];
    reader.read_exact(&mut body).await?;
    frame::decode(&body).map_err(invalid)
}

/// Writes one message.
///
/// # Errors
/// Where the connection has ended, or the other side does not read.
pub async fn write<M: Serialize>(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> Result<()> {
    let bytes = frame::encode(message).map_err(invalid)?;
    let written = async {
        writer.write_all(&bytes).await?;
        writer.flush().await
    };
    match tokio::time::timeout(WRITE_TIMEOUT, written).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::TimedOut.into()),
    }
}

/// Starts the task of a connection: writes an answer, what is sent again, and then what is queued;
/// passes on what it reads as `said` makes it, and at last the end, with its reason, as `ended`
/// does. The connection ends when the returned queue is dropped.
pub fn talk<In, Out, H>(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    (answer, again): (Option<impl Serialize + 'static>, Vec<Numbered<Out>>),
    happenings: mpsc::Sender<H>,
    said: impl Fn(Numbered<In>) -> H + 'static,
    ended: impl FnOnce(String) -> H + 'static,
) -> mpsc::Sender<Numbered<Out>>
where
    In: DeserializeOwned,
    Out: Serialize + 'static,
    H: 'static,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (outbox, mut frames) = mpsc::channel::<Numbered<Out>>(NUM_QUEUED);
    tokio::task::spawn_local(async move {
        let writing = async {
            if let Some(answer) = answer {
                write(&mut writer, &answer).await?;
            }
            for frame in again {
                write(&mut writer, &frame).await?;
            }
            while let Some(frame) = frames.recv().await {
                write(&mut writer, &frame).await?;
            }
            Ok(())
        };
        let reading = async {
            loop {
                let happening = said(read(&mut reader, MAX_FRAME_BYTES).await?);
                if happenings.send(happening).await.is_err() {
                    return Result::Ok(());
                }
            }
        };
        let result = tokio::select! {
            result = writing => result,
            result = reading => result,
        };
        let why = result.err().map_or_else(|| "closed".to_owned(), |error| error.to_string());
        let _ = happenings.send(ended(why)).await;
    });
    outbox
}

#[cfg(test)]
mod tests {
    use super::*;
    use rank_protocol::agent::{Join, MAX_JOIN_BYTES};

    /// What reading a first message from these bytes comes to.
    fn check_refused(length: u32, body: &[u8], kind: ErrorKind, what: &str) {
        let bytes = [&length.to_be_bytes()[..], body].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let error = runtime.block_on(read::<Join>(&mut &bytes[..], MAX_JOIN_BYTES)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }

    #[test]
    fn what_is_no_first_message_is_refused() {
        let over = u32::try_from(MAX_JOIN_BYTES).unwrap() + 1;
        let limit = format!("over the limit of {MAX_JOIN_BYTES}");
        check_refused(u32::MAX, &[], ErrorKind::InvalidData, &limit);
        check_refused(over, &vec![b' '; MAX_JOIN_BYTES + 1], ErrorKind::InvalidData, &limit);
        check_refused(9, b"{}", ErrorKind::UnexpectedEof, "");
        check_refused(2, b"{}", ErrorKind::InvalidData, "missing field");
        check_refused(5, b"hello", ErrorKind::InvalidData, "");
        check_refused(4, &[0xff, 0xfe, 0, 1], ErrorKind::InvalidData, "");
        check_refused(0, &[], ErrorKind::InvalidData, "");
    }
}
