//! A sandbox whose guest is hostile: it answers late or never, lies, and floods.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use bulkhead_protocol::agent::{ContainerStatsResponse, RemoveContainerResponse, StartContainerResponse};

use super::*;
use crate::agent::fake::{Fake, data, exited, oom};
use crate::error::Kind;
use crate::streams::Stdio;

const LIMIT: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Told(Mutex<Vec<SandboxEvent>>);

impl EventSink for Told {
    fn event(&self, event: SandboxEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Told {
    fn count(&self, wanted: impl Fn(&SandboxEvent) -> bool) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|event| wanted(event))
            .count()
    }
}

/// A sandbox with running containers, the guest's end of its agent, and what it has told.
struct Hostile {
    sandbox: Sandbox,
    agent: Fake,
    told: Arc<Told>,
    directory: PathBuf,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn hostile(name: &str, containers: &[&str]) -> Hostile {
    let directory = std::env::temp_dir().join(format!("bulkhead-hostile-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    let told = Arc::new(Told::default());
    let options = SandboxOptions {
        id: name.into(),
        config: Configuration::default(),
        hostname: String::new(),
        sysctls: HashMap::new(),
        shm_size: 0,
        files: HashMap::new(),
        demand: None,
        oom_score_adj: 0,
        cgroup: None,
        home_cgroup: None,
        journal: Journal::create(&directory).unwrap(),
        network: GuestNetwork::default(),
        timeline: Timeline::new(None),
        namespace: String::new(),
        snapshot: None,
    };
    // Nothing is booted: the VM and the agent take their places below.
    let sandbox = Sandbox::start(options, told.clone(), Some(Error::Finished));
    let vm = Vm::fake();
    let (agent, client) = Fake::pair(&vm, LIMIT);
    sandbox.0.end.send_replace(None);
    sandbox.lock().vm = Some(vm.clone());
    sandbox.0.boot.send_replace(Boot::Ready(Guest {
        vm: vm.clone(),
        agent: client.clone(),
    }));
    let ending = sandbox.clone();
    tokio::spawn(async move {
        let end = vm.ended().await;
        ending.vm_ended(&end);
    });
    for id in containers {
        let mut record = Record::new(id, false);
        record.machine.created();
        record.machine.begin_start("").unwrap();
        record.machine.started("");
        sandbox.lock().containers.insert((*id).into(), record);
    }
    let listening = sandbox.clone();
    tokio::spawn(async move {
        if let Ok(events) = client.within(PATIENCE).events().await {
            listening.run_events(events).await;
        }
    });
    Hostile {
        sandbox,
        agent,
        told,
        directory,
    }
}

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
const SIGTERM: u32 = libc::SIGTERM.unsigned_abs();

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

#[tokio::test]
async fn a_kill_that_is_not_answered_ends_the_vm_and_no_other_pod() {
    let silent = hostile("silent", &["a", "b"]);
    let mut other = hostile("other", &["c"]);
    other.agent.expect("Events").await;
    // Whoever asks a silent guest for something else gets an error in time, and the containers run on.
    let begun = Instant::now();
    let terminate = silent.sandbox.signal("a", "", SIGTERM, false);
    let (stats, processes, terminated) = tokio::join!(
        silent.sandbox.stats("a"),
        silent.sandbox.processes("b"),
        terminate
    );
    assert_eq!(stats.unwrap_err().kind(), Kind::DeadlineExceeded);
    assert_eq!(processes.unwrap_err().kind(), Kind::DeadlineExceeded);
    assert_eq!(terminated.unwrap_err().kind(), Kind::DeadlineExceeded);
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(silent.sandbox.state("a", "").unwrap().status, Status::Running);

    // The other pod is asked while the kill waits.
    let kill = silent.sandbox.signal("a", "", SIGKILL, true);
    let stats = other.sandbox.stats("c");
    let answer = async {
        let id = other.agent.expect("ContainerStats").await;
        other.agent.answer(id, &ContainerStatsResponse::default()).await
    };
    let (killed, stats, _) = soon(async { tokio::join!(kill, stats, answer) }).await;
    killed.unwrap();
    stats.unwrap();
    for id in ["a", "b"] {
        let exit = soon(silent.sandbox.wait(id, "")).await.unwrap();
        assert_eq!(exit.status, KILLED);
        soon(silent.sandbox.delete(id, "")).await.unwrap();
    }
    let exits = |told: &Told| told.count(|event| matches!(event, SandboxEvent::Exited { .. }));
    assert_eq!((exits(&silent.told), exits(&other.told)), (2, 0));
    let end = silent.sandbox.vm_now().unwrap().end().unwrap();
    assert!(end.reason.contains("did not kill container a"), "{end}");
    assert_eq!(other.sandbox.state("c", "").unwrap().status, Status::Running);
}

#[tokio::test]
async fn an_agent_that_breaks_the_rules_loses_its_vm_and_the_reason_is_told() {
    use crate::agent::fake::head;
    let mut hostile = hostile("oversize", &["a"]);
    hostile.agent.expect("Events").await;
    let head = head(1, ttrpc::proto::MESSAGE_TYPE_RESPONSE, 2 << 20);
    hostile.agent.send(&head).await;
    let exit = soon(hostile.sandbox.wait("a", "")).await.unwrap();
    assert_eq!(exit.status, KILLED);
    let end = hostile.sandbox.vm_now().unwrap().end().unwrap();
    assert!(end.reason.contains("a message of 2097152 bytes"), "{end}");
}

#[tokio::test]
async fn a_flood_of_lies_is_told_once_or_not_at_all() {
    let mut hostile = hostile("lies", &["a", "b"]);
    let stream = hostile.agent.expect("Events").await;
    let never_ending = hostile.sandbox.with("a", |record| {
        record.machine.add_exec("x")?;
        record.machine.begin_start("x")?;
        record.machine.started("x");
        Ok(())
    });
    never_ending.unwrap();
    // Memory that runs out again and again; ends of what does not exist; the same end over and over, held back for
    // a process that goes on.
    let lies = [
        oom("a"),
        oom("nobody"),
        exited("nobody", "", 1),
        exited("b", "nothing", 1),
        exited("a", "", u32::MAX),
    ];
    let lies: Vec<u8> = lies.iter().flat_map(|event| data(stream, event)).collect();
    let begin = std::time::Instant::now();
    for _ in 0..4000 {
        assert!(hostile.agent.send(&lies).await);
    }
    // An honest one behind them arrives.
    assert!(hostile.agent.event(stream, &exited("b", "", 3)).await);
    let exit = soon(hostile.sandbox.wait("b", "")).await.unwrap();
    assert_eq!(exit.status, 3);
    let told = &hostile.told;
    let oom = told.count(|event| matches!(event, SandboxEvent::OutOfMemory { .. }));
    // So many at once, and one a second: a busy machine takes its time over the flood.
    let seconds = begin.elapsed().as_secs() as usize + 1;
    assert!(
        (1..=crate::limits::OOM_EVENTS as usize + seconds).contains(&oom),
        "{oom} times out of memory"
    );
    let exits = told.count(|event| matches!(event, SandboxEvent::Exited { .. }));
    assert_eq!(exits, 1);
    // The one that was held back comes after its limit, with a status that fits.
    let exit = soon(hostile.sandbox.wait("a", "")).await.unwrap();
    assert_eq!(exit.status, 255);
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert!(tasks < 20, "{tasks} tasks");
}

#[tokio::test]
async fn made_up_counters_and_processes_are_left_out() {
    use bulkhead_protocol::agent::{ContainerProcess, IoStat, ListProcessesResponse};
    let mut hostile = hostile("made-up", &["a"]);
    hostile.agent.expect("Events").await;
    let Hostile { sandbox, agent, .. } = &mut hostile;
    let answers = async {
        let id = agent.expect("ContainerStats").await;
        let stats = ContainerStatsResponse {
            cpu: HashMap::from([("usage_usec".into(), u64::MAX), ("a\nb".into(), 1)]),
            io: vec![IoStat::default(); 10_000],
            pids_max: u64::MAX,
            ..ContainerStatsResponse::default()
        };
        agent.answer(id, &stats).await;
        let id = agent.expect("ListProcesses").await;
        let process = ContainerProcess {
            pid: 1,
            exec_id: "made\nup".into(),
            ..ContainerProcess::default()
        };
        let list = ListProcessesResponse {
            processes: vec![process; 50_000],
            ..ListProcessesResponse::default()
        };
        agent.answer(id, &list).await;
    };
    let questions = async { (sandbox.stats("a").await, sandbox.processes("a").await) };
    let (_, (stats, processes)) = soon(async { tokio::join!(answers, questions) }).await;
    let stats = stats.unwrap();
    assert_eq!(stats.io.len(), crate::limits::IO_DEVICES);
    assert_eq!(stats.cpu.keys().collect::<Vec<_>>(), ["usage_usec"]);
    let processes = processes.unwrap();
    assert_eq!(processes.len(), crate::limits::PROCESSES);
    assert!(processes.iter().all(|process| process.exec.is_empty()));
}

/// Makes a call and drops it when the guest has been `asked`.
async fn abandoned<T: std::fmt::Debug, I>(
    call: impl Future<Output = T>,
    asked: impl Future<Output = I>,
) -> I {
    soon(async {
        tokio::select! {
            id = asked => id,
            done = call => panic!("{done:?}"),
        }
    })
    .await
}

#[tokio::test]
async fn a_deletion_goes_on_when_its_caller_stops_waiting() {
    let mut pod = hostile("dropped", &["a", "b"]);
    let _ = pod.agent.expect("Events").await;
    pod.sandbox.process_exited("a", "", 7);
    let removal = {
        let delete = pod.sandbox.delete("a", "");
        let asked = pod.agent.expect("RemoveContainer");
        abandoned(delete, asked).await
    };
    // The first caller has gone. The next one hears how it ends.
    let again = pod.sandbox.delete("a", "");
    let removed = RemoveContainerResponse::default();
    let answer = pod.agent.answer(removal, &removed);
    let (exit, _) = soon(async { tokio::join!(again, answer) }).await;
    assert_eq!(exit.unwrap().status, 7);
    let gone = pod.sandbox.delete("a", "").await;
    assert!(matches!(gone, Err(Error::NoContainer(_))), "{gone:?}");
}

#[tokio::test]
async fn a_start_goes_on_when_its_caller_stops_waiting() {
    let mut pod = hostile("started", &[]);
    let _ = pod.agent.expect("Events").await;
    let mut record = Record::new("a", false);
    record.machine.created();
    pod.sandbox.lock().containers.insert("a".into(), record);
    let start = {
        let start = pod.sandbox.start_process("a", "", Stdio::default());
        let asked = pod.agent.expect("StartContainer");
        abandoned(start, asked).await
    };
    // The caller has gone. An exit waits until the start is known to have come to its end.
    pod.sandbox.process_exited("a", "", 3);
    pod.agent.answer(start, &StartContainerResponse::default()).await;
    assert_eq!(soon(pod.sandbox.wait("a", "")).await.unwrap().status, 3);
    assert_eq!(
        pod.told
            .count(|event| matches!(event, SandboxEvent::Started { .. })),
        1
    );
}
