//! The agent counted as hostile: what it may send costs bounded memory and time.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use ttrpc::proto::{Code, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE};

use super::fake::{Fake, data, head, oom};
use super::*;
use crate::Kind;

const LIMIT: Duration = Duration::from_millis(300);
/// For what must come at once; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn stats(agent: &Agent) -> Result<ContainerStatsResponse, Error> {
    agent.container_stats(&ContainerStatsRequest::default()).await
}

/// What the agent is found to have done when a question is answered with these bytes.
async fn violation_of(bytes: Vec<u8>) -> Option<Violation> {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asking = agent.clone();
    let asked = tokio::spawn(async move { stats(&asking).await });
    fake.expect("ContainerStats").await;
    fake.send(&bytes).await;
    let answer = tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap();
    assert!(matches!(answer, Err(Error::AgentLost { .. })), "{answer:?}");
    // The host takes nothing more.
    assert!(fake.request().await.is_none());
    agent.violation()
}

#[tokio::test]
async fn a_reply_over_the_limit_ends_the_connection_before_it_is_read() {
    for claimed in [limits::REPLY_BYTES + 1, 4 << 20, u32::MAX] {
        let violation = violation_of(head(1, MESSAGE_TYPE_RESPONSE, claimed)).await;
        let expected = Violation::TooLarge {
            bytes: claimed,
            limit: limits::REPLY_BYTES,
        };
        assert_eq!(violation, Some(expected));
    }
    let violation = violation_of(head(1, MESSAGE_TYPE_DATA, limits::EVENT_BYTES + 1)).await;
    assert!(matches!(violation, Some(Violation::TooLarge { .. })));
}

#[tokio::test]
async fn a_reply_of_the_largest_size_is_taken() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asked = tokio::spawn(async move { agent.list_processes(&ListProcessesRequest::default()).await });
    let id = fake.expect("ListProcesses").await;
    let process = agent::ContainerProcess {
        pid: 99_999,
        ..Default::default()
    };
    let list = ListProcessesResponse {
        processes: vec![process; 32_000],
        ..Default::default()
    };
    assert!(fake.answer(id, &list).await);
    assert_eq!(asked.await.unwrap().unwrap().processes.len(), 32_000);
}

#[tokio::test]
async fn an_agent_makes_no_requests() {
    for type_ in [MESSAGE_TYPE_REQUEST, 0, 77] {
        let violation = violation_of(head(1, type_, 3)).await;
        assert_eq!(violation, Some(Violation::Type(type_)));
    }
}

#[tokio::test]
async fn a_question_without_an_answer_times_out_and_the_next_is_hardly_waited_for() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), LIMIT);
    let begun = Instant::now();
    let error = stats(&agent).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { limit: LIMIT, .. }), "{error}");
    assert!(begun.elapsed() >= LIMIT);
    assert_eq!(agent.for_query().limit, limits::LATE_QUERY_TIME);
    // It answers again, and is waited for again.
    fake.expect("ContainerStats").await;
    let asking = agent.clone();
    let asked = tokio::spawn(async move {
        asking
            .within(PATIENCE)
            .container_stats(&ContainerStatsRequest::default())
            .await
    });
    let id = fake.expect("ContainerStats").await;
    fake.answer(id, &ContainerStatsResponse::default()).await;
    asked.await.unwrap().unwrap();
    assert_eq!(agent.for_query().limit, LIMIT.min(limits::QUERY_TIME));
}

#[tokio::test]
async fn a_message_that_comes_drop_by_drop_ends_the_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    let watch = Arc::new(Watch::default());
    let mut guarded = Guarded::new(ours, watch.clone(), LIMIT);
    let dripping = tokio::spawn(async move {
        let _ = theirs.write_all(&head(1, MESSAGE_TYPE_RESPONSE, 1000)).await;
        while theirs.write_all(b"x").await.is_ok() {
            tokio::time::sleep(LIMIT / 20).await;
        }
    });
    let begun = Instant::now();
    let mut read = 0;
    let error = loop {
        let mut byte = [0; 16];
        match tokio::time::timeout(PATIENCE, guarded.read(&mut byte))
            .await
            .unwrap()
        {
            Ok(length) => read += length,
            Err(error) => break error,
        }
    };
    assert_eq!(watch.violation(), Some(Violation::Slow));
    assert!(error.to_string().contains("not finished"), "{error}");
    assert!(begun.elapsed() >= LIMIT && read < 1000);
    drop(guarded);
    dripping.await.unwrap();
}

#[tokio::test]
async fn a_pause_between_messages_is_no_offence() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    let watch = Arc::new(Watch::default());
    let mut guarded = Guarded::new(ours, watch.clone(), LIMIT);
    for _ in 0..2 {
        let mut message = head(1, MESSAGE_TYPE_RESPONSE, 4);
        message.extend(b"full");
        theirs.write_all(&message).await.unwrap();
        let mut read = vec![0; message.len()];
        guarded.read_exact(&mut read).await.unwrap();
        assert_eq!(read, message);
        let waited = tokio::time::timeout(LIMIT * 2, guarded.read_u8()).await;
        assert!(waited.is_err());
    }
    assert_eq!(watch.violation(), None);
}

#[tokio::test]
async fn an_agent_that_reads_nothing_costs_its_own_requests_only() {
    let (fake, agent) = Fake::pair(&Vm::fake(), LIMIT);
    // More than any socket buffer holds.
    let request = CreateContainerRequest {
        spec_json: vec![b' '; 3 << 20],
        ..Default::default()
    };
    let begun = Instant::now();
    let (large, small) = tokio::join!(agent.create_container(&request), stats(&agent));
    assert!(large.is_err() && small.is_err());
    assert!(begun.elapsed() < PATIENCE);
    drop(fake);
}

#[tokio::test]
async fn words_of_the_agent_cannot_forge_lines_or_drive_a_terminal() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asked = tokio::spawn(async move { stats(&agent).await });
    let id = fake.expect("ContainerStats").await;
    let words = format!(
        "no\nlevel=error msg=forged\0\x1b[2J\u{202e}{}",
        "x".repeat(500_000)
    );
    fake.refuse(id, Code::NOT_FOUND, &words).await;
    let Err(Error::Agent { kind, message, .. }) = asked.await.unwrap() else {
        panic!("not refused")
    };
    assert_eq!(kind, Kind::NotFound);
    assert!(message.starts_with("no level=error msg=forged[2Jx"), "{message}");
    assert_eq!(message.chars().count(), limits::TEXT);
    assert!(!message.chars().any(char::is_control));
}

#[tokio::test]
async fn a_flood_of_events_waits_in_the_guest() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asking = agent.clone();
    let asked = tokio::spawn(async move { asking.events().await });
    let id = fake.expect("Events").await;
    let mut events = asked.await.unwrap().unwrap();
    // Nobody takes them yet.
    let event = data(id, &oom(&"c".repeat(1000)));
    let mut sent = 0;
    while sent < 100_000 {
        let taken = tokio::time::timeout(LIMIT, fake.send(&event)).await;
        if taken.is_err() {
            break;
        }
        sent += 1;
    }
    // What the host holds: the backlog, and what the socket's buffer takes.
    let most = limits::EVENT_BACKLOG + (1 << 20) / event.len();
    assert!(sent >= limits::EVENT_BACKLOG && sent <= most, "{sent} events");
    for _ in 0..sent {
        let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap();
        assert!(matches!(event, Some(event::Kind::Oom(_))));
    }
    assert_eq!(agent.violation(), None);
}

#[tokio::test]
async fn events_that_nobody_asked_for_end_the_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    let watch = Arc::new(Watch::default());
    let mut guarded = Guarded::new(ours, watch.clone(), LIMIT);
    let flooding = tokio::spawn(async move {
        let event = data(77, &oom("c"));
        while theirs.write_all(&event).await.is_ok() {}
    });
    let mut read = 0;
    let mut buffer = vec![0; 1000];
    while let Ok(length) = tokio::time::timeout(PATIENCE, guarded.read(&mut buffer))
        .await
        .unwrap()
    {
        read += length;
    }
    assert_eq!(watch.violation(), Some(Violation::Backlog));
    assert!(
        read <= (limits::EVENT_BACKLOG + 100) * data(77, &oom("c")).len(),
        "{read} bytes"
    );
    drop(guarded);
    flooding.await.unwrap();
}

#[tokio::test]
async fn an_event_of_an_unknown_kind_ends_the_stream() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asking = agent.clone();
    let asked = tokio::spawn(async move { asking.events().await });
    let id = fake.expect("Events").await;
    let mut events = asked.await.unwrap().unwrap();
    fake.event(id, &Event::default()).await;
    assert_eq!(events.next().await, None);
    assert_eq!(agent.violation(), Some(Violation::Event));
}

#[tokio::test]
async fn bytes_that_are_no_message_end_only_their_request() {
    let (mut fake, agent) = Fake::pair(&Vm::fake(), PATIENCE);
    let asking = agent.clone();
    let asked = tokio::spawn(async move { stats(&asking).await });
    let id = fake.expect("ContainerStats").await;
    let mut garbage = head(id, MESSAGE_TYPE_RESPONSE, 4);
    garbage.extend([0xff; 4]);
    // An answer to nobody before it.
    fake.answer(4711, &ContainerStatsResponse::default()).await;
    fake.send(&garbage).await;
    assert!(matches!(asked.await.unwrap(), Err(Error::AgentLost { .. })));
    let asked = tokio::spawn(async move { stats(&agent).await });
    let id = fake.expect("ContainerStats").await;
    fake.answer(id, &ContainerStatsResponse::default()).await;
    asked.await.unwrap().unwrap();
}
