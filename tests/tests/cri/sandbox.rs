//! The pod itself: names, files, namespaces, parameters of the kernel.

use bulkhead_tests::config;
use bulkhead_tests::cri::api::{DnsConfig, NamespaceMode, StatusRequest, VersionRequest};

use crate::pods;

#[test]
fn a_pod_with_one_container_runs_and_goes() {
    let test = pods("one");
    let pod = test.pod("pod").run();
    assert!(pod.is_ready());
    assert!(!pod.ip().is_empty());
    let main = pod.container("main", &["sleep", "1000"]).start();
    assert!(main.is_running());
    assert_eq!(main.sh("echo out; echo err >&2; exit 7").code, 7);
    assert_eq!(main.sh("echo hello").text(), "hello\n");
    main.stop(1);
    assert_eq!(main.status().exit_code, 137);
    main.remove();
    assert!(pod.containers().is_empty());
    assert!(pod.is_ready(), "a pod outlives its containers");
}

#[test]
fn a_pod_has_its_hostname_dns_hosts_and_shared_memory() {
    let test = pods("files");
    let pod = test
        .pod("pod")
        .with(|config| {
            config.hostname = "web-0".into();
            config.dns_config = Some(DnsConfig {
                servers: vec!["192.0.2.53".into()],
                searches: vec!["cluster.example".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            })
            .into();
        })
        .run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    assert_eq!(main.sh("hostname; cat /etc/hostname").text(), "web-0\nweb-0\n");
    assert_eq!(
        main.sh("cat /etc/resolv.conf").text(),
        "search cluster.example\nnameserver 192.0.2.53\noptions ndots:5\n"
    );
    assert!(main.sh("cat /etc/hosts").text().contains("localhost"));
    let shared = main.sh("grep ' /dev/shm ' /proc/mounts").text();
    assert!(
        shared.contains("tmpfs") && shared.contains("size=65536k"),
        "{shared}"
    );
    // Another container has the same shared memory.
    assert_eq!(main.sh("echo shared > /dev/shm/file").code, 0);
    let other = pod.container("other", &["cat", "/dev/shm/file"]).finish();
    assert_eq!(other.text(), "shared\n");
}

#[test]
fn parameters_of_the_kernel_are_set_in_the_guest() {
    let test = pods("sysctls");
    let on_host = |name: &str| std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap();
    let before = on_host("fs/mqueue/msg_max");
    let pod = test
        .pod("pod")
        .linux(|linux| {
            // A safe one, an unsafe one, and one of the network.
            for (name, value) in [
                ("kernel.shm_rmid_forced", "1"),
                ("fs.mqueue.msg_max", "100"),
                ("net.core.somaxconn", "1234"),
            ] {
                linux.sysctls.insert(name.into(), value.into());
            }
        })
        .run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let seen = main.sh("cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max net/core/somaxconn");
    assert_eq!(seen.text(), "1\n100\n1234\n");
    assert_eq!(on_host("fs/mqueue/msg_max"), before);
}

#[test]
fn containers_have_processes_of_their_own_or_of_the_pod() {
    let test = pods("processes");
    let own = test.pod("own").run();
    let a = own.container("a", &["sleep", "1111"]).start();
    let _b = own.container("b", &["sleep", "2222"]).start();
    let seen = a.sh("ps -o pid,args").text();
    assert!(seen.contains("1 sleep 1111") && !seen.contains("2222"), "{seen}");

    let shared = test
        .pod("shared")
        .namespaces(|namespaces| namespaces.pid = NamespaceMode::POD.into())
        .run();
    let a = shared.container("a", &["sleep", "3333"]).start();
    let b = shared.container("b", &["sleep", "4444"]).start();
    let seen = a.sh("ps -o pid,args").text();
    assert!(
        seen.contains("sleep 3333") && seen.contains("sleep 4444"),
        "{seen}"
    );
    assert!(!seen.contains("2222"), "{seen}");
    // One may signal the other.
    let processes = a.exec(&["ps", "-o", "pid,args"]).text();
    let line = processes
        .lines()
        .find(|line| line.ends_with("sleep 4444"))
        .unwrap();
    let other = line.split_whitespace().next().unwrap();
    assert_eq!(a.exec(&["kill", "-9", other]).code, 0);
    assert_eq!(b.wait().exit_code, 137);
}

#[test]
fn containers_of_a_pod_share_ipc_and_another_pod_does_not() {
    let test = pods("ipc");
    let pod = test.pod("pod").run();
    let other = test.pod("other").run();
    let a = pod.probe("a", &["tick"]).start();
    let b = pod.probe("b", &["tick"]).start();
    let c = other.probe("c", &["tick"]).start();
    let queue = a.exec(&["/probe", "queue", "make", "77"]).text();
    assert_eq!(b.exec(&["/probe", "queue", "find", "77"]).text(), queue);
    assert_eq!(c.exec(&["/probe", "queue", "find", "77"]).text(), "ENOENT\n");
}

#[test]
fn the_hosts_namespaces_are_refused_by_name() {
    let test = pods("refused");
    let refused = |suffix: &str, pod: bulkhead_tests::pod::PodBuilder<'_>, word: &str| match pod.try_run() {
        Ok(_) => panic!("{suffix} is not refused"),
        Err(status) => assert!(
            status.message.to_lowercase().contains(word),
            "{suffix}: no {word} in {status}"
        ),
    };
    let node = || NamespaceMode::NODE.into();
    // With `sandboxer = "shim"` containerd 2.1 itself crashes, before it asks a runtime: it has no specification then.
    if config().handler != "kata-shim" {
        let pod = test.pod("network").namespaces(|spaces| spaces.network = node());
        refused("hostNetwork", pod, "network");
    }
    let pod = test.pod("pid").namespaces(|spaces| spaces.pid = node());
    refused("hostPID", pod, "pid");
    let pod = test.pod("ipc").namespaces(|spaces| spaces.ipc = node());
    refused("hostIPC", pod, "ipc");
}

#[test]
fn an_unknown_handler_is_refused() {
    let test = pods("handler");
    let refused = test.pod("pod").handler("no-such-handler").try_run();
    let status = refused.unwrap_err();
    assert!(status.message.contains("no-such-handler"), "{status}");
}

#[test]
fn the_runtime_says_who_it_is() {
    let test = pods("runtime");
    let version = test.cri().version(&VersionRequest::default()).unwrap();
    assert_eq!(
        (
            version.runtime_name.as_str(),
            version.runtime_api_version.as_str()
        ),
        ("containerd", "v1")
    );
    let status = test.cri().status(&StatusRequest::default()).unwrap();
    for wanted in ["RuntimeReady", "NetworkReady"] {
        let condition = status
            .status
            .conditions
            .iter()
            .find(|condition| condition.type_ == wanted);
        assert!(condition.unwrap().status, "{condition:?}");
    }
}

#[test]
fn what_a_pod_is_made_from_is_told_back() {
    let test = pods("attributes");
    let pod = test
        .pod("pod")
        .with(|config| {
            config.labels.insert("app".into(), "web".into());
            config.annotations.insert("example/note".into(), "kept".into());
            config.metadata.mut_or_insert_default().attempt = 2;
        })
        .run();
    let status = pod.status();
    assert_eq!(status.metadata, pod.config.metadata);
    assert_eq!(
        (&status.labels, &status.annotations),
        (&pod.config.labels, &pod.config.annotations)
    );
    assert!(status.created_at > 0);
    let main = pod
        .container("main", &["sleep", "1000"])
        .attempt(3)
        .with(|config| {
            config.labels.insert("part".into(), "main".into());
            config.annotations.insert("example/other".into(), "kept".into());
        })
        .start();
    let status = main.status();
    assert_eq!(status.metadata, main.config.metadata);
    assert_eq!(
        (&status.labels, &status.annotations),
        (&main.config.labels, &main.config.annotations)
    );
    assert!(status.created_at > 0 && status.started_at >= status.created_at && status.finished_at == 0);
}
