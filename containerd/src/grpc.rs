//! Unary gRPC calls over a Unix socket: one message there, one back, on an HTTP/2 connection of its own.

use std::fmt;
use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use protobuf::Message;

/// gRPC's code for a call that was cancelled by its deadline.
pub const DEADLINE_EXCEEDED: u32 = 4;
/// gRPC's code for something that does not exist.
pub const NOT_FOUND: u32 = 5;
/// gRPC's code for a call that the server does not have.
pub const UNIMPLEMENTED: u32 = 12;

/// An answer larger than this is refused, in bytes.
const LARGEST: u32 = 64 << 20;

/// Why a call did not give an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// gRPC's code; 2 (unknown) also for a connection that failed.
    pub code: u32,
    /// What the server says.
    pub message: String,
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "code {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Status {}

/// The connection failed, or what came over it is not gRPC.
fn broken(error: impl fmt::Display) -> Status {
    Status {
        code: 2,
        message: format!("no answer: {error}"),
    }
}

/// Calls `method`, such as `runtime.v1.RuntimeService/Version`, in the containerd namespace `namespace`, if the service has
/// those.
///
/// # Errors
/// As [`call_bytes`].
pub fn call<A: Message>(
    socket: &Path,
    method: &str,
    namespace: Option<&str>,
    request: &impl Message,
    limit: Duration,
) -> Result<A, Status> {
    typed(request, |message| {
        call_bytes(socket, method, namespace, message, limit)
    })
}

/// A call of messages by one of their bytes.
pub(crate) fn typed<A: Message>(
    request: &impl Message,
    call: impl FnOnce(Vec<u8>) -> Result<Vec<u8>, Status>,
) -> Result<A, Status> {
    let answer = call(request.write_to_bytes().map_err(broken)?)?;
    A::parse_from_bytes(&answer).map_err(broken)
}

/// Calls a method with a message's bytes; gives those of the answer. Each call has its own connection, so that calls from
/// several threads do not wait for each other and none outlives a server that is started anew.
///
/// # Errors
/// What the server answers instead; [`DEADLINE_EXCEEDED`] when there is no answer within `limit`.
pub fn call_bytes(
    socket: &Path,
    method: &str,
    namespace: Option<&str>,
    message: Vec<u8>,
    limit: Duration,
) -> Result<Vec<u8>, Status> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(broken)?;
    runtime.block_on(async {
        let exchange = exchange(socket, method, namespace, message);
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(Status {
                code: DEADLINE_EXCEEDED,
                message: format!("{method} gave no answer in {limit:?}"),
            })
        })
    })
}

async fn exchange(
    socket: &Path,
    method: &str,
    namespace: Option<&str>,
    message: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let frame = frame(&message)?;
    let connected = tokio::net::UnixStream::connect(socket).await;
    let stream = connected.map_err(|error| broken(format!("{}: {error}", socket.display())))?;
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(LARGEST)
        .initial_connection_window_size(LARGEST)
        .handshake::<_, Cursor<Vec<u8>>>(stream)
        .await
        .map_err(broken)?;
    // It ends with the runtime; its errors reach the stream.
    tokio::spawn(connection);
    let request = head(method, namespace)?;
    let mut sender = sender.ready().await.map_err(broken)?;
    let (response, mut body) = sender.send_request(request, false).map_err(broken)?;
    body.send_data(Cursor::new(frame), true).map_err(broken)?;
    let (head, mut body) = response.await.map_err(broken)?.into_parts();
    let mut answer = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(broken)?;
        body.flow_control()
            .release_capacity(chunk.len())
            .map_err(broken)?;
        answer.extend_from_slice(&chunk);
    }
    // A call that fails at once has its status in the head.
    let trailers = body.trailers().await.map_err(broken)?.unwrap_or(head.headers);
    check(&trailers)?;
    unframe(&answer).map(<[u8]>::to_vec)
}

fn head(method: &str, namespace: Option<&str>) -> Result<http::Request<()>, Status> {
    let request = http::Request::post(format!("http://localhost/{method}"))
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    match namespace {
        Some(namespace) => request.header("containerd-namespace", namespace),
        None => request,
    }
    .body(())
    .map_err(broken)
}

/// Length-prefixed message: a byte that says "not compressed", four of length, big endian.
fn frame(message: &[u8]) -> Result<Vec<u8>, Status> {
    let length = u32::try_from(message.len()).map_err(broken)?;
    Ok([&[0], &length.to_be_bytes()[..], message].concat())
}

fn unframe(bytes: &[u8]) -> Result<&[u8], Status> {
    match bytes {
        [0, a, b, c, d, message @ ..] if u32::from_be_bytes([*a, *b, *c, *d]) as usize == message.len() => {
            Ok(message)
        }
        _ => Err(broken(format!("{} bytes that are no message", bytes.len()))),
    }
}

fn check(trailers: &http::HeaderMap) -> Result<(), Status> {
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    let code = text("grpc-status")
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| broken("no grpc-status"))?;
    if code == 0 {
        return Ok(());
    }
    Err(Status {
        code,
        message: percent_decoded(text("grpc-message").unwrap_or_default()),
    })
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, escaped) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn messages_are_framed() {
        assert_eq!(frame(b"ab").unwrap(), [0, 0, 0, 0, 2, b'a', b'b']);
        assert_eq!(unframe(&frame(b"ab").unwrap()).unwrap(), b"ab");
        for bad in [&b"\0\0\0\0\x03ab"[..], b"\x01\0\0\0\x02ab", b"\0\0", b""] {
            assert_eq!(unframe(bad).unwrap_err().code, 2, "{bad:?}");
        }
    }

    #[test]
    fn a_call_is_in_a_namespace_if_the_service_has_those() {
        let method = "containerd.services.tasks.v1.Tasks/Start";
        let with = head(method, Some("k8s.io")).unwrap();
        assert_eq!(with.uri().path(), format!("/{method}"));
        assert_eq!(with.headers()["containerd-namespace"], "k8s.io");
        let without = head(method, None).unwrap();
        assert!(!without.headers().contains_key("containerd-namespace"));
        assert_eq!(head(method, Some("a\nb")).unwrap_err().code, 2);
    }

    #[test]
    fn refusals_are_told() {
        let mut trailers = http::HeaderMap::new();
        assert_eq!(check(&trailers).unwrap_err().code, 2);
        trailers.insert("grpc-status", "0".parse().unwrap());
        check(&trailers).unwrap();
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "no pod %22x%22: 100%".parse().unwrap());
        let status = check(&trailers).unwrap_err();
        assert_eq!(status.code, NOT_FOUND);
        assert_eq!(status.message, "no pod \"x\": 100%");
    }
}
