#![allow(clippy::unwrap_used)]

use std::time::Instant;

use super::*;
use crate::{Error, Kind};

#[tokio::test]
async fn a_vmm_that_does_not_answer_is_waited_for_so_long() {
    let vm = Vm::pretend(false);
    let limit = Duration::from_millis(20);
    let begin = Instant::now();
    let error = vm.inspect(limit).await.unwrap_err();
    assert!(
        matches!(
            error,
            VmError::NoAnswer {
                request: "inspect",
                ..
            }
        ),
        "{error}"
    );
    let error = vm.request(Request::Pause, Vec::new(), limit).await.unwrap_err();
    assert!(error.to_string().contains("pause"), "{error}");
    assert_eq!(Error::from(error).kind(), Kind::DeadlineExceeded);
    assert!(begin.elapsed() < Duration::from_secs(5));
    // An error is not kept waiting for the console.
    assert_eq!(vm.console_tail().await, "");
}

#[tokio::test]
async fn a_wrong_answer_is_an_error() {
    let vm = Vm::fake();
    vm.ask(Request::Pause, Vec::new()).await.unwrap();
    let error = vm.inspect(Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(error, VmError::WrongReply("inspect")), "{error}");
}
