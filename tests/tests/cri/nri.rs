//! Plugins of containerd's Node Resource Interface, which change what a container is made from and its limits.

use std::fs;

use bulkhead_tests::config;
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::nri::Plugin;
use bulkhead_tests::nri::api::*;
use bulkhead_tests::settings;

use crate::pods;

fn memory(limit: i64) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: Some(OptionalInt64 {
                value: limit,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

#[test]
fn a_plugin_changes_containers_and_hears_of_them() {
    let test = pods("nri");
    let before_nri = settings::enable_nri(&test.containerd.directory);
    test.restart_containerd();
    let directory = test.work.join("from-plugin");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("file"), "put here by a plugin\n").unwrap();
    let mut resources = memory(96 << 20);
    resources.unified.insert("pids.max".into(), "77".into());
    let adjust = ContainerAdjustment {
        mounts: vec![Mount {
            destination: "/plugin".into(),
            type_: "bind".into(),
            source: directory.display().to_string(),
            options: vec!["rbind".into(), "ro".into()],
            ..Default::default()
        }],
        env: vec![KeyValue {
            key: "FROM_PLUGIN".into(),
            value: "yes".into(),
            ..Default::default()
        }],
        linux: Some(LinuxContainerAdjustment {
            resources: Some(resources).into(),
            oom_score_adj: Some(OptionalInt {
                value: 123,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };

    let limit = config().seconds(10);
    let pod = test.pod("pod").run();
    let before = pod.container("before", &["sleep", "1000"]).start();
    let mut plugin = Plugin::connect(&test.containerd.nri_socket(), &adjust, limit);
    for id in [&pod.id, &before.id] {
        assert!(plugin.was_told("Synchronize", id), "{:?}", plugin.told());
    }

    let main = pod.container("main", &["sleep", "1000"]).start();
    let seen = main
        .sh("echo $FROM_PLUGIN; cat /plugin/file; touch /plugin/new || echo read-only; cat /proc/1/oom_score_adj")
        .stdout;
    // NRI of containerd 1 knows no such adjustment.
    let score = if test.containerd.version.starts_with("1.") {
        0
    } else {
        123
    };
    assert_eq!(seen, format!("yes\nput here by a plugin\nread-only\n{score}\n"));
    let limits = "cd /sys/fs/cgroup; cat memory.max pids.max";
    assert_eq!(main.sh(limits).text(), format!("{}\n77\n", 96 << 20));
    // One that was there before is as it was, until the plugin changes it.
    assert_eq!(before.sh("echo $FROM_PLUGIN").text(), "\n");
    plugin.update(&before.id, memory(64 << 20));
    assert_eq!(
        before.sh("cat /sys/fs/cgroup/memory.max").text(),
        format!("{}\n", 64 << 20)
    );

    main.stop(0);
    main.remove();
    for event in [
        "CreateContainer",
        "StartContainer",
        "StopContainer",
        "RemoveContainer",
    ] {
        let told = wait_until(limit, || plugin.was_told(event, &main.id));
        assert!(told, "{event} not in {:?}", plugin.told());
    }
    let later = test.pod("later").run();
    let id = later.id.clone();
    drop(later);
    for event in ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"] {
        let told = wait_until(limit, || plugin.was_told(event, &id));
        assert!(told, "{event} not in {:?}", plugin.told());
    }

    // What a plugin asks for is refused like what a user asks for.
    drop(plugin);
    let hooks = ContainerAdjustment {
        hooks: Some(Hooks {
            prestart: vec![Hook {
                path: "/bin/true".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let plugin = Plugin::connect(&test.containerd.nri_socket(), &hooks, limit);
    let refused = pod.container("hooked", &["sleep", "1000"]).try_start();
    let refusal = refused.map(|container| container.id).unwrap_err();
    assert!(refusal.message.contains("hooks"), "{refusal}");
    drop(plugin);
    pod.remove().unwrap();
    fs::write(test.containerd.directory.join("config.toml"), before_nri).unwrap();
    test.restart_containerd();
}
