//! What a guest does when its connection ends: dial again, and wait for the call that makes it different from others
//! restored from the same snapshot.

use std::fs;
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::harness::{Guest, context, message, within};
use crate::specs::script;

fn request() -> proto::ResumeRequest {
    proto::ResumeRequest {
        version: proto::VERSION,
        entropy: vec![0x5a; 48],
        ..Default::default()
    }
}

async fn resume(guest: &Guest, request: &proto::ResumeRequest) -> ttrpc::Result<proto::ResumeResponse> {
    guest.client().resume(context(), request).await
}

fn hello() -> proto::HelloRequest {
    proto::HelloRequest {
        version: proto::VERSION,
        ..Default::default()
    }
}

pub async fn next_connection_needs_a_resume(guest: &mut Guest) {
    guest.sleeper("c").await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        guest.reconnect().await;
        let client = guest.client();
        let list = proto::ListProcessesRequest {
            container_id: "c".into(),
            ..Default::default()
        };
        let refused = "the guest has lost its connection and has had no Resume since";
        for (code, text) in [
            message(client.list_processes(context(), &list).await),
            message(client.hello(context(), &hello()).await),
            message(client.shutdown(context(), &proto::ShutdownRequest::new()).await),
        ] {
            assert_eq!((code, text.as_str()), (Code::FAILED_PRECONDITION, refused));
        }
        let mut events = client
            .events(context(), &proto::EventsRequest::new())
            .await
            .unwrap();
        assert_eq!(message(within(events.recv()).await).1, refused);

        let answer = resume(guest, &request()).await.unwrap();
        assert_eq!((answer.version, answer.frozen), (proto::VERSION, false));
        assert!(!answer.kernel_release.is_empty());
        assert!(answer.lost_uptime_us > 0);
        assert!(answer.lost_uptime_us <= answer.ready_uptime_us);
        assert!(answer.ready_uptime_us <= answer.resumed_uptime_us);
        println!(
            "        {} us from the end to the next connection, {} us for the resume",
            answer.ready_uptime_us - answer.lost_uptime_us,
            answer.resumed_uptime_us - answer.ready_uptime_us
        );
        assert_eq!(answer.session_id.len(), 32);
        sessions.push(answer.session_id);
        // From here on it is a connection like the first one; hosts ask with Hello whether the agent answers.
        client.hello(context(), &hello()).await.unwrap();
        let processes = client.list_processes(context(), &list).await.unwrap().processes;
        assert_eq!(processes.len(), 1);
        // One that hears of nothing does not notice the end of its connection either.
        let _ = client
            .events(context(), &proto::EventsRequest::new())
            .await
            .unwrap();
    }
    sessions.sort();
    sessions.dedup();
    assert_eq!(sessions.len(), 3);
    // The subscriber of the lost connection is gone with it: the event waits for the one to come.
    guest.reconnect().await;
    resume(guest, &request()).await.unwrap();
    guest.signal("c", "", libc::SIGKILL, false).await.unwrap();
    let events = guest.events(1).await;
    assert_eq!(events[0].exited().container_id, "c");
}

pub async fn refused_requests_change_nothing(guest: &mut Guest) {
    guest.reconnect().await;
    let wrong_version = proto::ResumeRequest {
        version: 99,
        hostname: "other".into(),
        ..request()
    };
    let short = proto::ResumeRequest {
        entropy: vec![1; 31],
        hostname: "other".into(),
        ..request()
    };
    let machine = proto::ResumeRequest {
        machine_id: "x".into(),
        hostname: "other".into(),
        ..request()
    };
    let version = format!(
        "protocol version 99 is not supported, this agent speaks {}",
        proto::VERSION
    );
    for (request, code, text) in [
        (wrong_version, Code::FAILED_PRECONDITION, version.as_str()),
        (
            short,
            Code::INVALID_ARGUMENT,
            "cannot resume: 31 bytes of entropy are not 32 to 4096",
        ),
        (
            machine,
            Code::INVALID_ARGUMENT,
            "cannot resume: \"x\" is not a machine id of 32 hexadecimal digits",
        ),
    ] {
        let (got, message) = message(resume(guest, &request).await);
        assert_eq!((got, message.as_str()), (code, text));
    }
    // Neither has counted as the connection's first call.
    let (code, _) = message(guest.create("c", &script("true"), &proto::Streams::new()).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    resume(guest, &request()).await.unwrap();
    let outcome = guest.run("c", &script("hostname"), None).await.unwrap();
    assert_eq!(outcome.stdout, "pod-host\n");
}

pub async fn identity_of_a_fork(guest: &mut Guest) {
    let kernel = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let look = script("hostname; cat /proc/sys/kernel/random/boot_id");
    let outcome = guest.run("before", &look, None).await.unwrap();
    assert_eq!(outcome.stdout, format!("pod-host\n{kernel}"));

    let mut boots = vec![kernel];
    for round in 0..2 {
        guest.reconnect().await;
        let name = format!("fork-{round}");
        let request = proto::ResumeRequest {
            fork: true,
            hostname: name.clone(),
            machine_id: "0123456789abcdef".repeat(2),
            files: [("resolv.conf".to_owned(), b"nameserver 192.0.2.9\n".to_vec())].into(),
            ..request()
        };
        resume(guest, &request).await.unwrap();
        let outcome = guest.run("after", &look, None).await.unwrap();
        let (hostname, boot) = outcome.stdout.split_once('\n').unwrap();
        assert_eq!((hostname, outcome.status), (name.as_str(), 0), "{outcome:?}");
        assert_eq!(boot.trim().len(), 36);
        assert!(!boots.contains(&boot.to_owned()), "{boot} is not new");
        boots.push(boot.to_owned());
        let file = |name| fs::read_to_string(guest.guest_file(&format!("/run/bulkhead/etc/{name}"))).unwrap();
        assert_eq!(file("resolv.conf"), "nameserver 192.0.2.9\n");
        assert_eq!(file("machine-id"), format!("{}\n", request.machine_id));
    }
}

pub async fn streams_are_joined_again(guest: &mut Guest) {
    let wanted = guest.streams(true, true, false);
    let echo = script("while read line; do echo got $line; done; echo end");
    guest.create("c", &echo, &wanted.message).await.unwrap();
    let [stdin, stdout, stderr] = wanted.accept().await;
    guest.start("c").await.unwrap();
    let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
    stdin.write_all(b"one\n").await.unwrap();
    let mut line = [0; 8];
    within(stdout.read_exact(&mut line)).await.unwrap();
    assert_eq!(&line, b"got one\n");

    // A socket has no way to be reset like a vsock one; joined again it is given up just so.
    let again = guest.streams(true, true, false);
    let reattach = proto::ReattachStreamsRequest {
        container_id: "c".into(),
        stdin_port: again.message.stdin_port,
        stdout_port: again.message.stdout_port,
        stderr_port: again.message.stderr_port,
        ..Default::default()
    };
    guest
        .client()
        .reattach_streams(context(), &reattach)
        .await
        .unwrap();
    let [new_in, new_out, new_err] = again.accept().await;
    for old in [stdout, stderr.unwrap()] {
        let mut rest = Vec::new();
        let mut old = old;
        within(old.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"");
    }
    drop(stdin);
    let (mut new_in, mut new_out) = (new_in.unwrap(), new_out.unwrap());
    new_in.write_all(b"two\n").await.unwrap();
    new_in.shutdown().await.unwrap();
    let mut rest = String::new();
    within(new_out.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "got two\nend\n");
    let mut rest = Vec::new();
    within(new_err.unwrap().read_to_end(&mut rest)).await.unwrap();
    assert_eq!(guest.wait("c", "").await, 0);
    guest.remove("c").await.unwrap();

    // Streams that it was not started with, and processes that are not there.
    guest.sleeper("quiet").await;
    let missing = proto::ReattachStreamsRequest {
        container_id: "quiet".into(),
        stdout_port: 1,
        ..Default::default()
    };
    let (code, text) = message(guest.client().reattach_streams(context(), &missing).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(text, "process \"\" of container \"quiet\" has no standard output");
    let gone = proto::ReattachStreamsRequest {
        exec_id: "e".into(),
        ..missing
    };
    let (code, _) = message(guest.client().reattach_streams(context(), &gone).await);
    assert_eq!(code, Code::NOT_FOUND);
}

/// As a host does it: without waiting for the answer.
pub async fn setup_sent_with_the_resume(guest: &mut Guest) {
    for (version, code) in [(99, Some(Code::FAILED_PRECONDITION)), (proto::VERSION, None)] {
        guest.reconnect().await;
        let client = guest.client();
        let (resume, network) = (
            proto::ResumeRequest { version, ..request() },
            proto::ConfigureNetworkRequest::new(),
        );
        let (resumed, configured) = tokio::join!(
            client.resume(context(), &resume),
            client.configure_network(context(), &network)
        );
        match code {
            Some(code) => {
                assert_eq!(message(resumed).0, code);
                assert_eq!(message(configured).0, code);
            }
            None => {
                resumed.unwrap();
                configured.unwrap();
            }
        }
    }
}

pub async fn dials_until_the_host_listens(guest: &mut Guest) {
    guest
        .without_host(tokio::time::sleep(Duration::from_millis(700)))
        .await;
    resume(guest, &request()).await.unwrap();
    guest.run("c", &script("true"), None).await.unwrap();
}
