//! Ends nobody asked for, and what a pod cannot have.

use bulkhead_tests::cri::api::{
    Device, Mount, MountPropagation, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{config, host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pods;

#[test]
fn a_pod_whose_vm_dies_is_not_ready_and_can_be_removed() {
    let test = pods("vm-dies");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let vmm = host::vmms_of(pod.shim())[0];
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    assert_eq!(main.wait().exit_code, 137);
    assert!(wait_until(config().seconds(10), || !pod.is_ready()));
    let late = pod.container("late", &["true"]).try_start();
    assert!(late.is_err(), "a container starts in a pod that has ended");
    pod.stop().unwrap();
    pod.remove().unwrap();
}

#[test]
fn a_pod_whose_shim_dies_is_not_ready_and_leaves_nothing() {
    let test = pods("shim-dies");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let second = pod.container("second", &["sleep", "1000"]).start();
    let (shim, vmm) = (pod.shim(), host::vmms_of(pod.shim())[0]);
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    assert!(wait_until(config().seconds(5), || !host::is_alive(vmm)));
    // 255 is containerd's own, for a task whose shim it can no longer ask: of that and the clean-up's 137 it keeps
    // what comes first.
    for container in [&main, &second] {
        let code = container.wait().exit_code;
        assert!([137, 255].contains(&code), "{code}");
    }
    assert!(wait_until(config().seconds(10), || !pod.is_ready()));
    pod.stop().unwrap();
    pod.remove().unwrap();
}

#[test]
fn an_exit_while_containerd_is_away_keeps_its_code() {
    let test = pods("away");
    let pod = test.pod("pod").run();
    let short = pod.container("short", &["sh", "-c", "sleep 3; exit 3"]).start();
    let long = pod.container("long", &["sleep", "1000"]).start();
    test.restart_containerd();
    assert_eq!(short.wait().exit_code, 3);
    assert!(long.is_running() && pod.is_ready());
    assert_eq!(long.sh("echo here").text(), "here\n");
}

#[test]
fn a_container_joins_the_processes_of_the_one_it_is_to_debug() {
    let test = pods("debug");
    let pod = test.pod("pod").run();
    let first = pod.container("first", &["sleep", "1111"]).start();
    let second = pod.container("second", &["sleep", "2222"]).start();
    let debug = pod
        .container("debug", &["sleep", "3333"])
        .security(|security| {
            security.namespace_options = Some(NamespaceOption {
                pid: NamespaceMode::TARGET.into(),
                target_id: second.id.clone(),
                ..Default::default()
            })
            .into();
        })
        .start();
    let seen = debug.sh("ps -o pid,args").text();
    assert!(
        seen.contains("1 sleep 2222") && seen.contains("sleep 3333"),
        "{seen}"
    );
    assert!(!seen.contains("1111"), "{seen}");
    assert!(!first.sh("ps -o args").text().contains("3333"));
    // It ends with the one that it looks at.
    second.stop(0);
    assert_eq!(debug.wait().exit_code, 137);
    assert!(first.is_running());
}

#[test]
fn process_one_of_a_shared_namespace_belongs_to_no_container() {
    let test = pods("pause");
    let pod = test
        .pod("pod")
        .namespaces(|namespaces| namespaces.pid = NamespaceMode::POD.into())
        .run();
    let first = pod.container("first", &["sleep", "1000"]).start();
    let second = pod.container("second", &["sleep", "1000"]).start();
    assert_eq!(first.sh("tr -d '\\0' < /proc/1/cmdline").text(), "/pause");
    assert_eq!(first.sh("kill -9 1; kill -TERM 1; ls /proc/1/root/").stdout, "");
    // It collects orphans, of containers that have gone too.
    let orphans = "for i in 1 2 3; do (sleep 0.2 & exit 0); done; sleep 1; grep -hc '^State:.Z' /proc/[0-9]*/status | grep -c 1; true";
    assert_eq!(first.sh(orphans).text(), "0\n");
    first.stop(0);
    first.remove();
    assert_eq!(second.sh("tr -d '\\0' < /proc/1/cmdline").text(), "/pause");
}

#[test]
fn user_namespaces_devices_and_mounts_that_flow_back_are_refused_by_field() {
    let test = pods("fields");
    let users = |config: &mut PodSandboxConfig| {
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        let options = security.namespace_options.mut_or_insert_default();
        let user = options.userns_options.mut_or_insert_default();
        user.mode = NamespaceMode::POD.into();
        for list in [&mut user.uids, &mut user.gids] {
            list.push(bulkhead_tests::cri::api::IdMapping {
                host_id: 1 << 16,
                container_id: 0,
                length: 1 << 16,
                ..Default::default()
            });
        }
    };
    let refused = test.pod("users").with(users).try_run();
    // containerd 1.7 has a check of its own.
    let text = refused.unwrap_err().message.to_lowercase();
    assert!(text.contains("user"), "{text}");

    let pod = test.pod("pod").run();
    let shared = test.work.join("shared");
    std::fs::create_dir_all(&shared).unwrap();
    let _mounted = Shared::new(&shared);
    let mount = Mount {
        host_path: shared.display().to_string(),
        container_path: "/shared".into(),
        propagation: MountPropagation::PROPAGATION_BIDIRECTIONAL.into(),
        ..Default::default()
    };
    let refused = pod.container("mount", &["true"]).mount(mount).try_start();
    let text = refused.unwrap_err().message;
    assert!(
        text.contains("mounts.options") && text.contains("/shared"),
        "{text}"
    );
    let device = |config: &mut bulkhead_tests::cri::api::ContainerConfig| {
        config.devices.push(Device {
            host_path: "/dev/kmsg".into(),
            container_path: "/dev/kmsg".into(),
            permissions: "rw".into(),
            ..Default::default()
        });
    };
    let refused = pod.container("device", &["true"]).with(device).try_start();
    let text = refused.unwrap_err().message;
    assert!(
        text.contains("linux.devices") && text.contains("/dev/kmsg"),
        "{text}"
    );
    // The pod is none the worse for it.
    assert_eq!(pod.container("fine", &["echo", "fine"]).finish().stdout, "fine\n");
}

#[test]
fn a_parameter_that_the_guest_does_not_have_is_refused_by_name() {
    let test = pods("parameter");
    let refused = test
        .pod("pod")
        .linux(|linux| {
            linux
                .sysctls
                .insert("kernel.no_such_parameter".into(), "1".into());
        })
        .try_run();
    let text = refused.unwrap_err().message;
    assert!(text.contains("kernel.no_such_parameter"), "{text}");
}

/// A mount point that mounts flow through, as containerd wants it before it asks for bidirectional propagation.
struct Shared<'a>(&'a std::path::Path);

impl<'a> Shared<'a> {
    fn new(path: &'a std::path::Path) -> Self {
        use nix::mount::{MsFlags, mount};
        let none = None::<&str>;
        mount(Some("shared"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, path, none, MsFlags::MS_SHARED, none).unwrap();
        Self(path)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.0);
    }
}
