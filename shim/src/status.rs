//! Errors as containerd sees them: gRPC codes and text.

use bulkhead_sandbox::error::chain;
use bulkhead_sandbox::{Error, Kind};
use ttrpc::proto::Code;

/// A ttrpc error with a code and the whole chain of causes.
#[must_use]
pub fn from_sandbox(error: &Error) -> ttrpc::Error {
    let code = match error.kind() {
        Kind::InvalidArgument => Code::INVALID_ARGUMENT,
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::Unimplemented => Code::UNIMPLEMENTED,
        Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::Cancelled => Code::CANCELLED,
        Kind::Internal => Code::INTERNAL,
    };
    status(code, chain(error))
}

/// A ttrpc error.
#[must_use]
pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}
