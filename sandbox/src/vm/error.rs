//! What can go wrong between this process and the VMM.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_protocol::control::ChannelError;

use crate::mount::MountError;
use crate::spawn::SpawnError;

/// Why the VMM could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A file is missing or not readable.
    #[error("Cannot open {what} {}", .path.display())]
    Open {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
    /// The VMM program is missing.
    #[error("Cannot open the VMM program")]
    Program(#[source] MountError),
    /// The control socket could not be made.
    #[error("Cannot create the control socket")]
    Socket(#[source] ChannelError),
    /// The VMM process could not be started.
    #[error("Cannot start the VMM process")]
    Spawn(#[source] SpawnError),
    /// A descriptor could not be prepared.
    #[error("Cannot prepare a descriptor")]
    Descriptor(#[source] std::io::Error),
    /// A message could not be sent.
    #[error("Cannot send {request} to the VMM")]
    Send {
        /// Name of the request.
        request: &'static str,
        /// Reason.
        #[source]
        error: ChannelError,
    },
    /// The VMM refused.
    #[error("The VMM refused {request}: {message}")]
    Refused {
        /// Name of the request.
        request: &'static str,
        /// The VMM's chain of causes.
        message: String,
    },
    /// The VMM did not answer in time.
    #[error("The VMM did not answer {request} within {} s", .limit.as_secs())]
    NoAnswer {
        /// Name of the request.
        request: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The VMM answered something else.
    #[error("The VMM gave a wrong answer to {0}")]
    WrongReply(&'static str),
    /// The VMM has ended.
    #[error("The VMM has ended")]
    Gone,
}
