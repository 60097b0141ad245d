//! Errors of a sandbox, each with the kind a caller acts on.

use std::time::Duration;

use ttrpc::proto::Code;

use crate::cgroup::CgroupError;
use crate::config::ConfigError;
use crate::fault::Step;
use crate::journal::JournalError;
use crate::mount::MountError;
use crate::network::NetworkError;
use crate::snapshot::SnapshotError;
use crate::spec::SpecError;
use crate::storage::StorageError;
use crate::vm::{VmEnd, VmError};

/// What a caller can do about an error; the same distinctions as gRPC's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong.
    InvalidArgument,
    /// There is no such thing, or it has ended.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The state does not allow it.
    FailedPrecondition,
    /// This runtime does not do that.
    Unimplemented,
    /// A deadline passed.
    DeadlineExceeded,
    /// The virtual machine is gone.
    Unavailable,
    /// Somebody else has ended it.
    Cancelled,
    /// Something broke.
    Internal,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::AlreadyExists,
        Self::FailedPrecondition,
        Self::Unimplemented,
        Self::DeadlineExceeded,
        Self::Unavailable,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The code of gRPC that says the same.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::InvalidArgument => Code::INVALID_ARGUMENT,
            Self::NotFound => Code::NOT_FOUND,
            Self::AlreadyExists => Code::ALREADY_EXISTS,
            Self::FailedPrecondition => Code::FAILED_PRECONDITION,
            Self::Unimplemented => Code::UNIMPLEMENTED,
            Self::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Self::Unavailable => Code::UNAVAILABLE,
            Self::Cancelled => Code::CANCELLED,
            Self::Internal => Code::INTERNAL,
        }
    }
}

impl From<Code> for Kind {
    fn from(code: Code) -> Self {
        match code {
            Code::OUT_OF_RANGE => Self::InvalidArgument,
            code => Self::ALL
                .into_iter()
                .find(|kind| kind.code() == code)
                .unwrap_or(Self::Internal),
        }
    }
}

/// Why an operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not usable.
    #[error("Configuration is not valid")]
    Config(#[from] ConfigError),
    /// The OCI specification is not usable.
    #[error("OCI specification is not valid")]
    Spec(#[from] SpecError),
    /// The cgroup could not be used.
    #[error("Cannot use the pod's cgroup")]
    Cgroup(#[from] CgroupError),
    /// The journal could not be kept.
    #[error("Cannot keep the journal")]
    Journal(#[from] JournalError),
    /// The file systems could not be prepared.
    #[error("Cannot prepare the container's file systems")]
    Storage(#[from] StorageError),
    /// A mount failed.
    #[error("Cannot mount")]
    Mount(#[from] MountError),
    /// The network could not be joined.
    #[error("Cannot set up the pod's network")]
    Network(#[from] NetworkError),
    /// The pod could not be saved, or begun from a snapshot.
    #[error("Cannot save or restore the pod")]
    Snapshot(#[from] SnapshotError),
    /// The VMM could not be started or asked.
    #[error("Cannot run the virtual machine")]
    Vm(#[from] VmError),
    /// The sandbox's start has failed; every later call gets the same answer.
    #[error("The sandbox did not start")]
    Boot(#[source] std::sync::Arc<Error>),
    /// The virtual machine ended.
    #[error("The virtual machine has ended: {0}")]
    Ended(VmEnd),
    /// A phase took too long.
    #[error("Timed out after {} s in phase \"{phase}\"{}", .limit.as_secs(), console_suffix(.console))]
    Timeout {
        /// What was waited for.
        phase: &'static str,
        /// The deadline.
        limit: Duration,
        /// End of the guest console.
        console: String,
    },
    /// The agent refused or failed.
    #[error("Guest agent, {phase}: {message}")]
    Agent {
        /// What was asked.
        phase: &'static str,
        /// From the status code.
        kind: Kind,
        /// The agent's own words, control characters removed.
        message: String,
    },
    /// The connection to the agent broke.
    #[error("Lost the guest agent in phase \"{phase}\": {message}")]
    AgentLost {
        /// What was asked.
        phase: &'static str,
        /// Reason given by the transport.
        message: String,
    },
    /// The agent speaks another protocol.
    #[error("The guest agent speaks protocol version {got}, {want} is needed")]
    AgentVersion {
        /// The agent's version.
        got: u32,
        /// This crate's version.
        want: u32,
    },
    /// No container of this id.
    #[error("Container {0} does not exist")]
    NoContainer(String),
    /// No process of this id.
    #[error("Process {exec} of container {container} does not exist")]
    NoProcess {
        /// Container id.
        container: String,
        /// Exec id.
        exec: String,
    },
    /// The id is taken.
    #[error("{0} already exists")]
    Exists(String),
    /// The process has ended.
    #[error("process already finished")]
    Finished,
    /// The state does not allow the operation.
    #[error("{what} is {state}: cannot {operation}")]
    State {
        /// The container or process.
        what: String,
        /// Its state.
        state: &'static str,
        /// What was asked.
        operation: &'static str,
    },
    /// This runtime does not do that.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A step did not succeed.
    #[error("Failed in phase \"{}\"", .0.words())]
    Step(Step, #[source] std::io::Error),
    /// Its end was asked for before it was made.
    #[error("Container {id} was ended in phase \"{phase}\" of its creation")]
    Cancelled {
        /// Container id.
        id: String,
        /// How far it was.
        phase: &'static str,
    },
    /// A helper task ended early.
    #[error("Internal task failed")]
    Task(#[source] tokio::task::JoinError),
}

fn console_suffix(console: &str) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("; console: {console}")
    }
}

impl Error {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Config(_) => Kind::InvalidArgument,
            Self::Spec(error) => error.kind(),
            Self::Network(error) => error.kind(),
            Self::Storage(error) => error.kind(),
            Self::Snapshot(error) => error.kind(),
            Self::Boot(error) => error.kind(),
            Self::Agent { kind, .. } => *kind,
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Kind::NotFound,
            Self::Exists(_) => Kind::AlreadyExists,
            Self::State { .. } => Kind::FailedPrecondition,
            Self::Unsupported(_) => Kind::Unimplemented,
            Self::Timeout { .. } | Self::Vm(VmError::NoAnswer { .. }) => Kind::DeadlineExceeded,
            Self::Cancelled { .. } => Kind::Cancelled,
            Self::Ended(_) | Self::AgentLost { .. } => Kind::Unavailable,
            Self::Cgroup(CgroupError::Path(_)) => Kind::InvalidArgument,
            Self::Cgroup(_)
            | Self::Journal(_)
            | Self::Mount(_)
            | Self::Vm(_)
            | Self::Step(..)
            | Self::AgentVersion { .. }
            | Self::Task(_) => Kind::Internal,
        }
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
