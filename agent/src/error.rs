//! Errors of the agent's service and how they travel to the host.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use ttrpc::Code;

use crate::cgroup::CgroupError;
use crate::container::spec::SpecError;
use crate::job::JobError;
use crate::network::NetworkError;
use crate::network::forward::ForwardError;
use crate::network::plug::PlugError;
use crate::processors::ProcessorError;
use crate::resume::ResumeError;
use crate::sandbox::SandboxError;
use crate::streams::StreamError;

/// A file or directory could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {}", path.display())]
pub struct FileError {
    /// What was tried.
    verb: &'static str,
    /// The file.
    path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// A closure for `map_err` that says what was tried with `path`.
pub fn failed<E: Into<io::Error>>(verb: &'static str, path: &Path) -> impl FnOnce(E) -> FileError {
    move |source| FileError {
        verb,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// What a call of the agent can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host speaks another version of the protocol.
    #[error("protocol version {0} is not supported, this agent speaks {1}")]
    Version(u32, u32),
    /// A call on a connection that had no first call.
    #[error("the connection has had no Hello")]
    NotGreeted,
    /// A call on a further connection that had no first call.
    #[error("the guest has lost its connection and has had no Resume since")]
    NotResumed,
    /// A call that would change something.
    #[error("the guest is frozen for a checkpoint")]
    Frozen,
    /// Calls that do not end.
    #[error("{0} calls are still being carried out")]
    Busy(usize),
    /// What differs from other guests could not be set.
    #[error("cannot resume")]
    Resume(#[source] ResumeError),
    /// A field of the request has a value that makes no sense.
    #[error("invalid {field}: {value:?}")]
    Invalid {
        /// Name of the field in `agent.proto`.
        field: &'static str,
        /// The offending value.
        value: String,
    },
    /// JSON in a request does not parse.
    #[error("invalid {field}")]
    Json {
        /// Name of the field in `agent.proto`.
        field: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The specification asks for something a guest cannot give.
    #[error("unsupported specification")]
    Spec(#[source] SpecError),
    /// No container of that id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No process of that id in the container, or it has exited.
    #[error("process {1:?} of container {0:?} does not exist or has exited")]
    NoProcess(String, String),
    /// The id is in use.
    #[error("container {0:?} exists")]
    ContainerExists(String),
    /// The exec id is in use.
    #[error("process {1:?} of container {0:?} exists")]
    ProcessExists(String, String),
    /// The operation does not fit the container's state.
    #[error("container {id:?} is {state}, not {wanted}")]
    State {
        /// Container.
        id: String,
        /// Its state.
        state: &'static str,
        /// The state or states the operation needs.
        wanted: &'static str,
    },
    /// A second `SetupSandbox`.
    #[error("the sandbox is set up already")]
    SandboxExists,
    /// The process was started without that stream.
    #[error("process {exec:?} of container {id:?} has no {stream}")]
    NoStream {
        /// Container.
        id: String,
        /// Process.
        exec: String,
        /// The stream.
        stream: &'static str,
    },
    /// The process has no terminal.
    #[error("process {1:?} of container {0:?} has no terminal")]
    NoTerminal(String, String),
    /// The creation of a container failed.
    #[error("cannot create container {id:?}")]
    Create {
        /// Container.
        id: String,
        /// Cause.
        #[source]
        source: Box<Error>,
    },
    /// The start of a container failed.
    #[error("cannot start container {id:?}: {reason}")]
    Start {
        /// Container.
        id: String,
        /// As the container's init process reported it.
        reason: String,
    },
    /// The start of an additional process failed.
    #[error("cannot start process {exec:?} in container {id:?}")]
    Exec {
        /// Container.
        id: String,
        /// Process.
        exec: String,
        /// Cause.
        #[source]
        source: Box<Error>,
    },
    /// A helper process failed.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The standard streams could not be connected.
    #[error("cannot connect standard streams")]
    Streams(#[source] StreamError),
    /// A cgroup file could not be read or written.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network could not be configured.
    #[error("cannot configure the network")]
    Network(#[source] NetworkError),
    /// A device could not be taken or given up.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// A stream could not be forwarded.
    #[error("cannot forward a stream")]
    Forward(#[source] ForwardError),
    /// Processors could not be brought on line.
    #[error("cannot change the processors on line")]
    Processors(#[source] ProcessorError),
    /// The sandbox could not be set up.
    #[error("cannot set up the sandbox")]
    Sandbox(#[source] SandboxError),
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// A closure for `map_err` that says what was tried.
    pub fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }

    /// The gRPC code the host sees.
    pub fn code(&self) -> Code {
        match self {
            Self::Version(..)
            | Self::NotGreeted
            | Self::NotResumed
            | Self::Frozen
            | Self::Busy(_)
            | Self::NoStream { .. }
            | Self::State { .. }
            | Self::SandboxExists
            | Self::NoTerminal(..) => Code::FAILED_PRECONDITION,
            Self::Invalid { .. } | Self::Json { .. } | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Processors(ProcessorError::Count { .. }) => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoProcess(..) => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists(..) => Code::ALREADY_EXISTS,
            Self::Create { source, .. } | Self::Exec { source, .. } => source.code(),
            Self::Start { .. } => Code::INVALID_ARGUMENT,
            Self::Job(error) if error.is_refused() => Code::INVALID_ARGUMENT,
            Self::Cgroup(error) if error.is_argument() => Code::INVALID_ARGUMENT,
            Self::Network(error) if error.is_argument() => Code::INVALID_ARGUMENT,
            // What a pod asks of the kernel.
            Self::Sandbox(SandboxError::Sysctl(..) | SandboxError::SysctlName(_)) => Code::INVALID_ARGUMENT,
            Self::Forward(error) if error.is_argument() => Code::INVALID_ARGUMENT,
            Self::Forward(ForwardError::Connect { .. }) => Code::UNAVAILABLE,
            Self::Resume(error) if error.is_argument() => Code::INVALID_ARGUMENT,
            Self::Job(_)
            | Self::Resume(_)
            | Self::Streams(_)
            | Self::Cgroup(_)
            | Self::Network(_)
            | Self::Plug(_)
            | Self::Forward(_)
            | Self::Processors(_)
            | Self::Sandbox(_)
            | Self::Io { .. } => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

/// The error and all its causes in one line.
///
/// A cause that the text already ends with is left out: some crates repeat the source in their own text.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            let _ = write!(text, ": {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_every_cause_once() {
        let error = Error::Create {
            id: "c".into(),
            source: Box::new(Error::Io {
                what: "cannot open /x".into(),
                source: std::io::Error::from_raw_os_error(libc::ENOENT),
            }),
        };
        assert_eq!(
            chain(&error),
            "cannot create container \"c\": cannot open /x: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn code_of_a_wrapped_error_is_that_of_its_cause() {
        let error = Error::Exec {
            id: "c".into(),
            exec: "e".into(),
            source: Box::new(Error::Invalid {
                field: "cwd",
                value: "x".into(),
            }),
        };
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        assert_eq!(Error::NoContainer("c".into()).code(), Code::NOT_FOUND);
        let sysctl = SandboxError::SysctlName("x".into());
        assert_eq!(Error::Sandbox(sysctl).code(), Code::INVALID_ARGUMENT);
    }
}
