//! Volumes of pods, in the places where the kubelet has them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_tests::fixture::{Run, shell, wait_until};
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::{Finished, Fixture, Session, config};

use crate::fixture;

/// A pod whose containers mount volumes.
struct Pod<'a> {
    test: &'a Fixture,
    annotation: String,
    containers: Vec<String>,
}

impl<'a> Pod<'a> {
    fn new(test: &'a Fixture) -> Self {
        let annotation = format!("io.kubernetes.cri.sandbox-id={}", test.id("pod"));
        let sandbox = test
            .busybox("pod", &["/pause"])
            .with(&["--annotation", "io.kubernetes.cri.container-type=sandbox"])
            .with(&["--annotation", &annotation])
            .detach();
        Self {
            test,
            annotation,
            containers: vec![sandbox],
        }
    }

    /// A container with bind mounts: source, destination, options.
    fn run(&self, name: &str, mounts: &[(&Path, &str, &str)], command: &[&str]) -> Run<'a> {
        let mut run = self
            .test
            .run(name, PROBE_IMAGE, command)
            .with(&["--annotation", "io.kubernetes.cri.container-type=container"])
            .with(&["--annotation", &self.annotation]);
        for (source, destination, options) in mounts {
            let mount = format!(
                "type=bind,src={},dst={destination},options={options}",
                source.display()
            );
            run = run.with(&["--mount", &mount]);
        }
        run
    }

    /// Leaves a container running.
    fn start(&mut self, name: &str, mounts: &[(&Path, &str, &str)]) -> String {
        let id = self.run(name, mounts, &["sleep", "1000"]).detach();
        self.containers.push(id.clone());
        id
    }

    fn exec(&self, id: &str, exec: &str, command: &[&str]) -> Finished {
        let arguments = [&["tasks", "exec", "--exec-id", exec, id], command].concat();
        self.test.ctr(&arguments)
    }

    fn exec_beside(&self, id: &str, exec: &str, command: &[&str]) -> Session {
        let arguments = [&["tasks", "exec", "--exec-id", exec, id], command].concat();
        Session::start(self.test.containerd.ctr(&arguments), config().seconds(60))
    }

    fn shell(&self, id: &str, exec: &str, script: &str) -> String {
        self.exec(id, exec, &["sh", "-c", script]).text()
    }

    fn stop(&mut self, id: &str) {
        self.containers.retain(|other| other != id);
        self.test.kill_and_remove(id);
    }

    fn remove(mut self) {
        for id in std::mem::take(&mut self.containers).iter().rev() {
            self.test.kill_and_remove(id);
        }
    }
}

/// Where the kubelet would have a pod's volume of this kind.
fn volume(test: &Fixture, kind: &str, name: &str) -> PathBuf {
    let path = test
        .work
        .join("pods/0b6c-11/volumes")
        .join(format!("kubernetes.io~{kind}"))
        .join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Writes a version of a volume as the kubelet does, and removes the one before it.
fn write_version(directory: &Path, version: &str, files: &[(&str, &str)]) {
    let content = directory.join(version);
    fs::create_dir(&content).unwrap();
    for (name, text) in files {
        fs::write(content.join(name), text).unwrap();
        fs::set_permissions(content.join(name), fs::Permissions::from_mode(0o440)).unwrap();
        chown(content.join(name), Some(0), Some(2345)).unwrap();
    }
    let before = fs::read_link(directory.join("..data")).ok();
    symlink(version, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    for (name, _) in files {
        let link = directory.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    if let Some(before) = before {
        fs::remove_dir_all(directory.join(before)).unwrap();
    }
}

#[test]
fn sockets_and_locks_work_between_containers() {
    let test = fixture("volume-shared");
    let disk = volume(&test, "empty-dir", "disk");
    let memory = volume(&test, "empty-dir", "memory");
    shell(&format!("mount -t tmpfs -o size=8m tmpfs {}", memory.display()));
    chown(&memory, Some(0), Some(2345)).unwrap();
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o2777)).unwrap();
    let mut pod = Pod::new(&test);
    let mounts = |options| {
        [
            (disk.as_path(), "/disk", options),
            (memory.as_path(), "/memory", options),
        ]
    };
    let a = pod.start("a", &mounts("rbind:rw"));
    let b = pod.start("b", &mounts("rbind:rprivate:rw"));
    for (place, exec) in [("/disk", "1"), ("/memory", "2")] {
        let server = pod.exec_beside(&a, &format!("serve{exec}"), &["/probe", "serve", place]);
        server.wait_for("serving");
        let said = pod
            .exec(&b, &format!("ask{exec}"), &["/probe", "ask", place])
            .text();
        assert_eq!(said, "flock is held\nfcntl lock is held\nhello over the volume\n");
        let _ = server.finish().expect_code(0);
    }
    // In memory: the guest's, with the host's limit and owner; nothing of it is on the host.
    let seen = pod.shell(
        &b,
        "seen",
        "stat -c '%a %g' /memory; grep ' /memory ' /proc/mounts; df -k /memory | tail -1",
    );
    assert!(
        seen.starts_with("2777 2345\ntmpfs ") || seen.contains(" tmpfs "),
        "{seen}"
    );
    assert!(seen.contains(" 8192 "), "{seen}");
    let full = pod.shell(
        &a,
        "full",
        "dd if=/dev/zero of=/memory/x bs=1M count=9 2>&1; true",
    );
    assert!(full.contains("No space left"), "{full}");
    assert_eq!(fs::read_dir(&memory).unwrap().count(), 0);
    assert!(disk.join("flock").exists());

    // It outlives the containers that use it, as a pod's volume does.
    pod.shell(
        &a,
        "keep",
        "rm /memory/x; echo kept > /memory/kept; mkdir /memory/sub; echo deep > /memory/sub/file",
    );
    pod.stop(&a);
    pod.stop(&b);
    // subPath of the volume in memory: the kubelet binds a directory of it somewhere else.
    let sub = test.work.join("pods/0b6c-11/volume-subpaths/memory/c/0");
    fs::create_dir_all(&sub).unwrap();
    fs::create_dir(memory.join("sub")).unwrap();
    shell(&format!(
        "mount --bind {}/sub {}",
        memory.display(),
        sub.display()
    ));
    let c = pod.start(
        "c",
        &[(&memory, "/memory", "rbind:ro"), (&sub, "/sub", "rbind:rw")],
    );
    assert_eq!(
        pod.shell(
            &c,
            "kept",
            "cat /memory/kept /sub/file; echo x 2>/dev/null > /memory/y || echo ro"
        ),
        "kept\ndeep\nro\n"
    );
    pod.shell(&c, "write", "echo new > /sub/new; cat /memory/sub/new");
    pod.remove();
    shell(&format!("umount {} {}", sub.display(), memory.display()));
}

#[test]
fn updates_are_pushed_whole() {
    let test = fixture("volume-updates");
    let map = volume(&test, "configmap", "settings");
    write_version(&map, "..2026_1", &[("a", "one"), ("b", "one"), ("gone", "one")]);
    // By its layout alone, for kinds of volumes that are written the same way.
    let other = test.work.join("other");
    fs::create_dir(&other).unwrap();
    write_version(&other, "..1", &[("token", "first")]);
    let mut pod = Pod::new(&test);
    let file = map.join("a");
    let mounts = [
        (map.as_path(), "/settings", "rbind:ro"),
        (other.as_path(), "/other", "rbind:ro"),
        (file.as_path(), "/file", "bind:ro"),
    ];
    let a = pod.start("a", &mounts);
    let b = pod.start("b", &mounts);
    let first = pod.shell(
        &b,
        "first",
        "cat /settings/a /other/token; stat -c ' %a %g' /settings/..data/b; ls /settings",
    );
    assert_eq!(first, "onefirst 440 2345\na\nb\ngone\n");
    // A reader that runs all the time sees one version or the other.
    let script = "while [ ! -e /tmp/stop ]; do cd /settings/..data 2>/dev/null && \
        x=$(cat a 2>/dev/null) && y=$(cat b 2>/dev/null) && \
        if [ \"$x\" != \"$y\" ]; then echo mix $x $y; fi; done; echo reader done";
    let reader = pod.exec_beside(&b, "reader", &["sh", "-c", script]);
    let watcher = pod.exec_beside(&a, "watch", &["/probe", "watch", "/settings"]);
    watcher.wait_for("watching");
    let second = config().seconds(1);
    // The last one is larger than what fits into a message. A second as well, but emulation copies more slowly than it does
    // the rest.
    let longer = config().seconds(2) - Duration::from_secs(1);
    let updates = [
        ("two", 1, second),
        ("three", 1, second),
        ("four", 6 << 20, longer),
    ];
    for (count, (version, size, limit)) in updates.into_iter().enumerate() {
        let large = "x".repeat(size);
        write_version(
            &map,
            &format!("..2026_{version}"),
            &[("a", version), ("b", version), ("large", &large)],
        );
        let begin = Instant::now();
        watcher.wait_for_count("event ..data\n", count + 1);
        // The clock is the emulated host's; on hardware it is a few milliseconds.
        assert!(begin.elapsed() < limit, "{version}: {:?}", begin.elapsed());
        for (id, name) in [(&a, "a"), (&b, "b")] {
            let seen = pod.shell(
                id,
                &format!("{name}{count}"),
                "cat /settings/a; ls /settings | tr '\\n' ' '; stat -Lc %s /settings/large",
            );
            assert_eq!(seen, format!("{version}a b large {size}\n"));
        }
    }
    // Many at once: the last one stays.
    for number in 0..20 {
        write_version(
            &other,
            &format!("..n{number}"),
            &[("token", &format!("number {number}"))],
        );
    }
    let mut tries = 0;
    assert!(wait_until(config().seconds(5), || {
        tries += 1;
        pod.shell(&a, &format!("last{tries}"), "cat /other/token") == "number 19"
    }));
    // As in Kubernetes, a single file does not follow.
    assert_eq!(pod.shell(&a, "file", "cat /file"), "one");
    pod.shell(&b, "stop", "touch /tmp/stop");
    let said = reader.finish().text();
    assert_eq!(said, "reader done\n");
    pod.shell(&a, "end", "kill $(pidof probe) 2>/dev/null; true");
    pod.remove();
    drop(watcher);
}

#[test]
fn read_only_and_nested_volumes() {
    let test = fixture("volume-flags");
    let outer = test.work.join("outer");
    fs::create_dir_all(outer.join("inner")).unwrap();
    fs::create_dir_all(outer.join("below")).unwrap();
    // A mount that tells others of what is mounted below it, as every mount does under systemd.
    let outer_path = outer.display();
    shell(&format!(
        "mount --bind {outer_path} {outer_path} && mount --make-shared {outer_path} && mount -t tmpfs tmpfs {outer_path}/below"
    ));
    let inner = test.work.join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("program"), "#!/bin/sh\necho runs\n").unwrap();
    fs::set_permissions(inner.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    shell(&format!("mknod -m 666 {}/zero c 1 5", inner.display()));
    let link = test.work.join("link");
    symlink("outer", &link).unwrap();
    let file = test.work.join("file");
    fs::write(&file, "file\n").unwrap();
    let mut pod = Pod::new(&test);
    let a = pod.start(
        "a",
        &[
            (&link, "/ro", "rbind:ro"),
            (&outer, "/rro", "rbind:rro"),
            (&outer, "/rw", "rbind:rw:rslave"),
            (&inner, "/rw/inner", "rbind:rw"),
            (&inner, "/noexec", "rbind:rw:noexec:nosuid"),
            (&file, "/single", "bind:ro"),
        ],
    );
    let script = "for f in /ro/x /ro/below/x /rro/x /rro/below/y /rw/x /rw/below/z /rw/inner/x /single; do \
        (echo text > $f) 2>/dev/null && echo $f; done; /noexec/program 2>/dev/null || echo noexec; /rw/inner/program; \
        dd if=/rw/inner/zero of=/dev/null bs=1 count=1 2>/dev/null || echo nodev; cat /single";
    assert_eq!(
        pod.shell(&a, "write", script),
        "/rw/x\n/rw/below/z\n/rw/inner/x\nnoexec\nruns\nnodev\nfile\n"
    );
    assert!(inner.join("x").exists() && outer.join("below/z").exists() && !outer.join("inner/x").exists());
    // What the host mounts later appears where that was asked for, and there only.
    let later = outer.join("later");
    fs::create_dir(&later).unwrap();
    shell(&format!("mount -t tmpfs tmpfs {}", later.display()));
    fs::write(later.join("here"), "").unwrap();
    let mut tries = 0;
    assert!(wait_until(config().seconds(5), || {
        tries += 1;
        pod.shell(&a, &format!("later{tries}"), "ls /rw/later")
            .contains("here")
    }));
    assert!(!pod.shell(&a, "private", "ls /ro/later").contains("here"));
    pod.remove();
    shell(&format!(
        "umount {outer_path}/later {outer_path}/below {outer_path}"
    ));
}

#[test]
fn a_block_device_is_a_disk_of_the_container() {
    let test = fixture("volume-block");
    let image = test.work.join("image");
    fs::write(&image, vec![0; 8 << 20]).unwrap();
    let mut command = std::process::Command::new("losetup");
    command.args(["--find", "--show"]).arg(&image);
    let device = Session::start(command, config().seconds(10)).finish().text();
    let device = device.trim();
    let script = "set -e; test -b /dev/xvda; printf data | dd of=/dev/xvda bs=1 seek=4096 conv=notrunc 2>/dev/null; \
        dd if=/dev/xvda bs=1M 2>/dev/null | wc -c";
    let number = fs::metadata(device).unwrap().rdev();
    let run = test.spec("a", &["/bin/sh", "-c", script], |mut spec| {
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        spec.0["linux"]["devices"] = serde_json::json!([
            {"path": "/dev/xvda", "type": "b", "major": major, "minor": minor, "fileMode": 0o660}]);
        let rules = spec.0["linux"]["resources"]["devices"].as_array_mut().unwrap();
        rules.push(
            serde_json::json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "rwm"}),
        );
        spec
    });
    assert_eq!(run.finish().text(), format!("{}\n", 8 << 20));
    let written = fs::read(device).unwrap();
    assert_eq!(&written[4096..4100], b"data");
    // As a mount, read-only.
    let mount = format!("type=bind,src={device},dst=/dev/disk,options=bind:ro");
    let run = test
        .busybox(
            "b",
            &[
                "sh",
                "-c",
                "dd if=/dev/disk bs=4096 skip=1 count=1 2>/dev/null | head -c 4; echo x > /dev/disk",
            ],
        )
        .with(&["--mount", &mount]);
    let done = run.finish();
    assert!(done.stdout.starts_with(b"data"), "{done}");
    assert!(!done.status.success());
    assert_eq!(fs::read(device).unwrap(), written);
    shell(&format!("losetup --detach {device}"));
    std::thread::sleep(Duration::from_millis(100));
}
