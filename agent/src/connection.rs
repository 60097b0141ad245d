//! The agent's connection to the host, and the next one when it ends.
//!
//! The connection of a guest ends when it goes on from a snapshot: its driver hears of a transport reset (virtio 1.2,
//! 5.10.6.8) and the kernel resets every vsock connection. The agent then dials the host again, without waiting:
//! how soon a restored pod works depends on it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bulkhead_protocol::ports;
use futures::stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use ttrpc::r#async::transport::Listener;

use crate::error::chain;
use crate::fd::AsyncFile;
use crate::gate::Gate;
use crate::service::uptime_us;
use crate::streams::Host;

/// Pauses between attempts to reach a host that does not listen: the first, and the longest, which each one doubles up to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(250));

/// A listener that accepts `first`, and whenever a connection ends dials the host for the next one.
pub fn successive(first: AsyncFile, host: Host, gate: Arc<Gate>) -> Listener {
    let state = Successive {
        host,
        gate,
        next: Some(first),
        current: None,
    };
    Listener::new(stream::unfold(state, |mut state| async move {
        let connection = state.accept().await;
        Some((io::Result::Ok(connection), state))
    }))
}

struct Successive {
    host: Host,
    gate: Arc<Gate>,
    next: Option<AsyncFile>,
    current: Option<(AsyncFile, Arc<Notify>)>,
}

impl Successive {
    async fn accept(&mut self) -> Connection {
        if let Some((file, ended)) = self.current.take() {
            tokio::select! {
                () = file.failed() => (),
                () = ended.notified() => (),
            }
            self.gate.lost(uptime_us());
            // A reset makes the socket ready for nothing but its error: without this its reader would wait for ever.
            file.shutdown_both();
        }
        let file = match self.next.take() {
            Some(first) => first,
            None => {
                let file = redial(&self.host).await;
                self.gate.regained(uptime_us());
                file
            }
        };
        let ended = Arc::new(Notify::new());
        self.current = Some((file.clone(), Arc::clone(&ended)));
        Connection { file, ended }
    }
}

/// Dials until the host answers: there is nothing else for a guest to do.
async fn redial(host: &Host) -> AsyncFile {
    let mut pause = PAUSES.0;
    loop {
        match host.dial(ports::AGENT).await {
            Ok(file) => return file,
            Err(error) if pause == PAUSES.0 => log::warn!("{}; trying on", chain(&error)),
            Err(_) => (),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// One connection, which tells of its end.
#[derive(Debug)]
struct Connection {
    file: AsyncFile,
    ended: Arc<Notify>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.ended.notify_one();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let wanted = buf.remaining() > 0;
        let result = ready!(Pin::new(&mut self.file).poll_read(cx, buf));
        if result.is_err() || (wanted && buf.filled().len() == before) {
            self.ended.notify_one();
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.file).poll_write(cx, data));
        if result.is_err() {
            self.ended.notify_one();
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_shutdown(cx)
    }
}
