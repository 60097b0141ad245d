//! Streams of the host to servers that listen on the guest's loopback address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use tokio::net::TcpStream;

use crate::streams::{Host, StreamError};

/// Loopback answers at once; a server whose queue is full does not.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Why a stream could not be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A field of the request makes no sense.
    #[error("invalid {field}: {value:?}")]
    Invalid {
        /// Field in `agent.proto`.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// No server.
    #[error("cannot connect to port {port} of the guest's loopback address")]
    Connect {
        /// Port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host did not take the stream.
    #[error("cannot dial the host")]
    Dial(#[source] StreamError),
}

impl ForwardError {
    /// Whether the host's request is to blame.
    pub fn is_argument(&self) -> bool {
        matches!(self, Self::Invalid { .. })
    }
}

/// Connects to the server, then to the host, and joins the two until both directions are at their end.
///
/// # Errors
/// One of them does not answer.
pub async fn forward(host: &Host, request: &proto::ForwardRequest) -> Result<(), ForwardError> {
    let invalid = |field, value: &dyn ToString| ForwardError::Invalid {
        field,
        value: value.to_string(),
    };
    let address: IpAddr = request
        .address
        .parse()
        .ok()
        .filter(IpAddr::is_loopback)
        .ok_or_else(|| invalid("address", &request.address))?;
    let port = u16::try_from(request.port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| invalid("port", &request.port))?;
    let mut server = connect(address, port)
        .await
        .map_err(|source| ForwardError::Connect { port, source })?;
    let mut stream = host.dial(request.stream_port).await.map_err(ForwardError::Dial)?;
    tokio::spawn(async move {
        // What breaks one end ends the other: both are closed here.
        let _ = tokio::io::copy_bidirectional(&mut server, &mut stream).await;
    });
    Ok(())
}

/// Connects to the address, or, if it refuses, to the other family's loopback: who dials "localhost" means both.
async fn connect(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let other = match address {
        IpAddr::V4(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
    };
    let dial = async |address| {
        let connecting = TcpStream::connect(SocketAddr::new(address, port));
        tokio::time::timeout(CONNECT_LIMIT, connecting).await?
    };
    match dial(address).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            dial(other).await.map_err(|_| error)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};

    use super::*;

    fn request(address: &str, port: u16) -> proto::ForwardRequest {
        proto::ForwardRequest {
            address: address.into(),
            port: port.into(),
            stream_port: 70_000,
            ..Default::default()
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn each_direction_ends_by_itself() {
        let directory = std::env::temp_dir().join(format!("bulkhead-forward-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let host_end = UnixListener::bind(directory.join("70000")).unwrap();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let host = Host::Unix(directory.clone());
        // The address that refuses is not the last word.
        for address in ["127.0.0.1", "::1"] {
            forward(&host, &request(address, port)).await.unwrap();
            let (mut client, _) = host_end.accept().await.unwrap();
            let (mut served, _) = server.accept().await.unwrap();
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut text = String::new();
            served.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "question");
            served.write_all(b"answer").await.unwrap();
            drop(served);
            text.clear();
            client.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "answer");
        }
        drop(server);
        let refused = forward(&host, &request("127.0.0.1", port)).await.unwrap_err();
        assert!(matches!(refused, ForwardError::Connect { .. }), "{refused}");
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_loopback_is_forwarded_to() {
        let host = Host::Unix("/nonexistent".into());
        for (address, port) in [("192.0.2.1", 80), ("", 80), ("::", 80), ("127.0.0.1", 0)] {
            let error = forward(&host, &request(address, port)).await.unwrap_err();
            assert!(error.is_argument(), "{error}");
        }
    }
}
