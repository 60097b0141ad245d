//! What stands between the agent's stream and the ttrpc client, which itself takes messages of 4 MiB, waits for the
//! rest of one for ever and queues events without a bound.
//!
//! Every byte passes through; the heads of the messages are read on the way. A guest that breaks a limit breaks the
//! connection, and a VM does not outlive its agent's connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader};

use crate::limits;

/// How an agent broke the rules of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An answer or event is too large.
    #[error("a message of {bytes} bytes, where {limit} are allowed")]
    TooLarge {
        /// Its size.
        bytes: u32,
        /// The limit.
        limit: u32,
    },
    /// The agent serves; it makes no requests.
    #[error("a message of type {0}, which is neither an answer nor an event")]
    Type(u8),
    /// A message was begun and not finished.
    #[error("a message that was not finished in time")]
    Slow,
    /// Events that nobody has asked for filled the backlog.
    #[error("more than {} events in no stream", limits::EVENT_BACKLOG)]
    Backlog,
    /// An event of a kind this version does not know.
    #[error("an event of an unknown kind")]
    Event,
}

/// What the guard and the reader of the events share.
#[derive(Debug, Default)]
pub(super) struct Watch {
    broken: OnceLock<Violation>,
    backlog: AtomicUsize,
    reader: Mutex<Option<Waker>>,
}

impl Watch {
    /// The first violation, if there was one.
    pub fn violation(&self) -> Option<Violation> {
        self.broken.get().copied()
    }

    /// Notes a violation; the first one stays.
    pub fn broke(&self, violation: Violation) {
        let _ = self.broken.set(violation);
    }

    /// An event was taken.
    pub fn took_event(&self) {
        let before = self
            .backlog
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |backlog| {
                backlog.checked_sub(1)
            });
        if before == Ok(limits::EVENT_BACKLOG)
            && let Some(waker) = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            waker.wake();
        }
    }

    fn is_full(&self) -> bool {
        self.backlog.load(Ordering::Acquire) >= limits::EVENT_BACKLOG
    }
}

/// The agent's stream with its limits.
#[derive(Debug)]
pub(super) struct Guarded<S> {
    stream: S,
    watch: Arc<Watch>,
    head: Vec<u8>,
    /// Bytes of the current message after its head.
    rest: u32,
    is_event: bool,
    /// Runs while a message has begun, or the backlog is full.
    timer: Pin<Box<Sleep>>,
    timing: bool,
    time: Duration,
}

impl<S> Guarded<S> {
    /// A message may take `time`.
    pub fn new(stream: S, watch: Arc<Watch>, time: Duration) -> Self {
        Self {
            stream,
            watch,
            head: Vec::with_capacity(MESSAGE_HEADER_LENGTH),
            rest: 0,
            is_event: false,
            timer: Box::pin(sleep(time)),
            timing: false,
            time,
        }
    }

    fn is_inside(&self) -> bool {
        self.rest > 0 || !self.head.is_empty()
    }

    /// Follows bytes that have arrived.
    fn follow(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let part = self.rest.min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                self.rest -= part;
                bytes = &bytes[part as usize..];
            } else {
                let part = (MESSAGE_HEADER_LENGTH - self.head.len()).min(bytes.len());
                self.head.extend(&bytes[..part]);
                bytes = &bytes[part..];
                if self.head.len() < MESSAGE_HEADER_LENGTH {
                    return Ok(());
                }
                let header = MessageHeader::from(&self.head);
                self.head.clear();
                self.is_event = header.type_ == MESSAGE_TYPE_DATA;
                let limit = match header.type_ {
                    MESSAGE_TYPE_DATA => limits::EVENT_BYTES,
                    MESSAGE_TYPE_RESPONSE => limits::REPLY_BYTES,
                    other => return Err(Violation::Type(other)),
                };
                if header.length > limit {
                    return Err(Violation::TooLarge {
                        bytes: header.length,
                        limit,
                    });
                }
                self.rest = header.length;
            }
            if self.rest == 0 {
                // The message is whole: the next one has its own time.
                self.timing = false;
                if self.is_event {
                    self.watch.backlog.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        Ok(())
    }

    fn run_timer(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.timing {
            self.timer.as_mut().reset(Instant::now() + self.time);
            self.timing = true;
        }
        self.timer.as_mut().poll(context)
    }

    fn fail(&self, violation: Violation) -> Poll<io::Result<()>> {
        self.watch.broke(violation);
        Poll::Ready(Err(io::Error::other(violation)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(violation) = this.watch.violation() {
            return this.fail(violation);
        }
        if !this.is_inside() && this.watch.is_full() {
            let waker = context.waker().clone();
            *this.watch.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker);
            // An event may have been taken in between.
            if this.watch.is_full() {
                return match this.run_timer(context) {
                    Poll::Ready(()) => this.fail(Violation::Backlog),
                    Poll::Pending => Poll::Pending,
                };
            }
            this.timing = false;
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(context, buffer);
        if let Poll::Ready(Ok(())) = polled
            && let Err(violation) = this.follow(&buffer.filled()[before..])
        {
            return this.fail(violation);
        }
        if this.is_inside() && this.run_timer(context).is_ready() {
            return this.fail(Violation::Slow);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
