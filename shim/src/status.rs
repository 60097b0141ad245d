//! Errors as containerd sees them: gRPC codes and text.

use bulkhead_sandbox::Error;
use bulkhead_sandbox::error::chain;
use ttrpc::proto::Code;

/// A ttrpc error with a code and the whole chain of causes.
#[must_use]
pub fn from_sandbox(error: Error) -> ttrpc::Error {
    status(error.kind().code(), chain(&error))
}

/// A ttrpc error.
#[must_use]
pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use bulkhead_sandbox::Kind;
    use proptest::prelude::*;
    use protobuf::{Enum, Message};

    use super::*;

    proptest! {
        /// From the code of the agent's answer to the one that containerd gets, over the bytes of both.
        #[test]
        fn the_agents_codes_reach_containerd(code in 0i32..17, words in "\\PC{0,40}") {
            let code = Code::from_i32(code).unwrap();
            let answer = ttrpc::get_status(code, words.clone()).write_to_bytes().unwrap();
            let answer = ttrpc::proto::Status::parse_from_bytes(&answer).unwrap();
            let kind = Kind::from(answer.code());
            let error = Error::Agent { phase: "test", kind, message: answer.message.clone() };
            prop_assert_eq!(error.kind(), kind);
            let ttrpc::Error::RpcStatus(told) = from_sandbox(error) else { panic!() };
            let told = ttrpc::proto::Status::parse_from_bytes(&told.write_to_bytes().unwrap()).unwrap();
            prop_assert!(told.message.ends_with(&words), "{}", told.message);
            let known = Kind::ALL.iter().any(|kind| kind.code() == code);
            match code {
                Code::OUT_OF_RANGE => prop_assert_eq!(told.code(), Code::INVALID_ARGUMENT),
                code if known => prop_assert_eq!(told.code(), code),
                // Success is no error; of the rest nobody can make anything.
                _ => prop_assert_eq!(told.code(), Code::INTERNAL),
            }
        }
    }

    #[test]
    fn every_kind_has_a_code_of_its_own() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from(kind.code()), kind);
            assert_ne!(kind.code(), Code::OK);
        }
    }
}
