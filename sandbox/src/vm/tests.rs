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

#[tokio::test]
async fn a_vmm_that_has_closed_its_socket_has_ended() {
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    drop(theirs);
    let (commands, receiver) = mpsc::unbounded_channel();
    let actor = actor::Actor {
        channel: watch_fd(ours).unwrap(),
        pidfd: watch_fd(spawn::pidfd_open(child.id().try_into().unwrap()).unwrap()).unwrap(),
        commands: receiver,
        pending: HashMap::new(),
        next_id: 1,
        events: mpsc::unbounded_channel().0,
        exit: None,
        memory: watch::channel(0).0,
        oom_kills_before: 0,
        cgroup: None,
        stderr: actor::Lines::default(),
        verdict: Arc::default(),
    };
    let (reply, answer) = oneshot::channel();
    let request = Command {
        request: Request::Pause,
        descriptors: Vec::new(),
        reply,
    };
    commands.send(request).unwrap();
    // Nobody is answered before it has been reaped.
    assert_eq!(actor.run().await.reason, "VMM killed by signal 9");
    assert!(answer.await.is_err());
    let error = child.wait().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECHILD));
}
