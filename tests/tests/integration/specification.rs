//! Everything the OCI specification asks for is so inside the container.

use std::collections::BTreeMap;
use std::fs;

use bulkhead_tests::Finished;
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::spec::Spec;
use serde_json::{Value, json};

use crate::fixture;

fn report(done: Finished) -> Value {
    serde_json::from_str(&done.text()).unwrap()
}

/// The last mount at a point: the one that is seen.
fn mount_at<'a>(report: &'a Value, point: &str) -> &'a Value {
    let mounts = report["mounts"].as_array().unwrap();
    mounts
        .iter()
        .rfind(|mount| mount["point"] == point)
        .unwrap_or_else(|| panic!("no {point} in {mounts:#?}"))
}

fn has(mount: &Value, list: &str, option: &str) -> bool {
    mount[list].as_array().unwrap().iter().any(|has| has == option)
}

fn capabilities(numbers: &[u32]) -> String {
    format!(
        "{:016x}",
        numbers.iter().fold(0_u64, |set, number| set | 1 << number)
    )
}

#[test]
fn flags_of_ctr_are_honoured() {
    let test = fixture("flags");
    fs::write(test.work.join("file"), "content").unwrap();
    let shared = test.work.display();
    let seen = report(
        test.probe("a", &["report"])
            .with(&[
                "--user",
                "1234:2345",
                "--cwd",
                "/etc",
                "--env",
                "ONE=1",
                "--env",
                "EMPTY=",
            ])
            .with(&["--hostname", "named", "--read-only", "--cap-add", "CAP_SYS_TIME"])
            .with(&["--cap-drop", "CAP_NET_RAW", "--seccomp"])
            .with(&[
                "--mount",
                &format!("type=bind,src={shared},dst=/ro,options=rbind:ro"),
            ])
            .with(&[
                "--mount",
                &format!("type=bind,src={shared}/file,dst=/etc/file,options=bind:rw"),
            ])
            .with(&[
                "--mount",
                "type=tmpfs,src=tmpfs,dst=/scratch,options=size=4m:mode=1700",
            ])
            .finish(),
    );
    let status = &seen["status"];
    assert_eq!(
        (&status["Uid"], &status["Gid"]),
        (&json!("1234\t1234\t1234\t1234"), &json!("2345\t2345\t2345\t2345"))
    );
    assert_eq!(seen["cwd"], "/etc");
    assert_eq!(
        (&seen["environment"]["ONE"], &seen["environment"]["EMPTY"]),
        (&json!("1"), &json!(""))
    );
    assert!(seen["environment"]["PATH"].as_str().unwrap().contains("bin"));
    let names = seen["environment"].as_object().unwrap().keys();
    let unasked: Vec<_> = names
        .filter(|name| !["PATH", "HOME", "ONE", "EMPTY"].contains(&name.as_str()))
        .collect();
    assert!(unasked.is_empty(), "{unasked:?}");

    assert_eq!(seen["hostname"], "named");
    let bounding = u64::from_str_radix(status["CapBnd"].as_str().unwrap(), 16).unwrap();
    assert!(bounding & 1 << 25 != 0, "CAP_SYS_TIME is missing: {bounding:x}");
    assert!(bounding & 1 << 13 == 0, "CAP_NET_RAW is there: {bounding:x}");
    assert_eq!(
        (&status["Seccomp"], &status["NoNewPrivs"]),
        (&json!("2"), &json!("1"))
    );
    assert!(has(mount_at(&seen, "/"), "options", "ro"));
    assert!(has(mount_at(&seen, "/ro"), "options", "ro"));
    assert!(has(mount_at(&seen, "/etc/file"), "options", "rw"));
    assert_eq!(mount_at(&seen, "/scratch")["type"], "tmpfs");
    assert!(
        has(mount_at(&seen, "/scratch"), "super_options", "size=4096k"),
        "{seen}"
    );
}

#[test]
fn mounts_and_masks_do_what_they_say() {
    let test = fixture("mounts");
    let shared = test.work.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "content\n").unwrap();
    let source = shared.display();
    // Each line tries one thing and names the error.
    let expected = [
        ("write /new", "EROFS"),
        ("write /ro/new", "EROFS"),
        ("read /ro/file", "ok"),
        ("write /rw/new", "ok"),
        ("write /one-file", "ok"),
        ("write /proc/sys/kernel/domainname", "EROFS"),
        ("list /masked-directory", "ok"),
        ("read /masked-file", "ok"),
        ("write /rw/file", "EROFS"),
        ("write /dev/null", "ok"),
        ("write /dev/shm/new", "ok"),
    ];
    let tries: String = expected
        .iter()
        .map(|(what, _)| format!("echo {what}: $(/probe errno {what});"))
        .collect();
    let script =
        format!("{tries} ls /masked-directory | wc -l; wc -c < /masked-file; cat /proc/kcore | wc -c");
    let run = test.spec("a", &["/bin/sh", "-c", &script], |spec| {
        spec.set("/root/readonly", json!(true))
            .mount("bind", &source.to_string(), "/ro", &["rbind", "ro"])
            .mount("bind", &source.to_string(), "/rw", &["rbind", "rw"])
            .mount("bind", &format!("{source}/file"), "/one-file", &["bind", "rw"])
            .set(
                "/linux/maskedPaths",
                json!(["/masked-directory", "/masked-file", "/proc/kcore", "/not/there"]),
            )
            .set(
                "/linux/readonlyPaths",
                json!(["/proc/sys", "/rw/file", "/not/there"]),
            )
    });
    // What is masked has something to hide, and a read-only root must have the mount points.
    let root = test.rootfs();
    fs::create_dir(root.join("masked-directory")).unwrap();
    fs::write(root.join("masked-directory/hidden"), "hidden").unwrap();
    fs::write(root.join("masked-file"), "hidden").unwrap();
    for point in ["ro", "rw"] {
        fs::create_dir(root.join(point)).unwrap();
    }
    fs::write(root.join("one-file"), "").unwrap();
    let text = run.finish().text();
    let mut lines = text.lines();
    for (what, outcome) in expected {
        assert_eq!(
            lines.next(),
            Some(format!("{what}: {outcome}").as_str()),
            "{text}"
        );
    }
    assert_eq!(
        lines.collect::<Vec<_>>(),
        ["0", "0", "0"],
        "masked paths show something: {text}"
    );
    assert!(shared.join("new").exists() && !root.join("new").exists());
}

#[test]
fn the_process_is_as_specified() {
    let test = fixture("process");
    let seen = test.spec("a", &["/probe", "report"], |spec| {
        spec.set(
            "/process/user",
            json!({ "uid": 1234, "gid": 2345, "additionalGids": [3456, 4567], "umask": 0o27 }),
        )
        .set("/process/cwd", json!("/etc"))
        .set("/process/env", json!(["PATH=/bin", "A=b c", "UTF=☃"]))
        .set("/process/noNewPrivileges", json!(true))
        .set("/process/oomScoreAdj", json!(300))
        .set(
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_NOFILE", "soft": 333, "hard": 444 },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
                { "type": "RLIMIT_NPROC", "soft": 50, "hard": 60 },
            ]),
        )
        .set(
            "/process/capabilities",
            json!({
                "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_TIME"],
                "permitted": ["CAP_CHOWN", "CAP_KILL"],
                "effective": ["CAP_CHOWN"],
                "inheritable": ["CAP_CHOWN", "CAP_KILL"],
                "ambient": ["CAP_CHOWN", "CAP_KILL"],
            }),
        )
        .set("/hostname", json!("by-specification"))
    });
    let seen = report(seen.finish());
    let status: BTreeMap<String, String> = serde_json::from_value(seen["status"].clone()).unwrap();
    assert_eq!(
        (status["Uid"].as_str(), status["Gid"].as_str()),
        ("1234\t1234\t1234\t1234", "2345\t2345\t2345\t2345")
    );
    assert_eq!(status["Groups"], "3456 4567");
    assert_eq!(status["Umask"], "0027");
    assert_eq!(status["NoNewPrivs"], "1");
    // CAP_CHOWN is 0, CAP_KILL 5, CAP_SYS_TIME 25. Ambient capabilities survive the exec by a user.
    assert_eq!(status["CapBnd"], capabilities(&[0, 5, 25]));
    assert_eq!(status["CapAmb"], capabilities(&[0, 5]));
    assert_eq!(status["CapPrm"], capabilities(&[0, 5]));
    let mut environment = seen["environment"].clone();
    // Runtimes add it, from the image's passwd, when the specification has none.
    environment.as_object_mut().unwrap().remove("HOME");
    assert_eq!(environment, json!({ "PATH": "/bin", "A": "b c", "UTF": "☃" }));

    assert_eq!(
        (&seen["cwd"], &seen["hostname"]),
        (&json!("/etc"), &json!("by-specification"))
    );
    assert_eq!(seen["oom_score_adj"], "300");
    let limits = &seen["limits"];
    assert_eq!(limits["Max open files"], json!(["333", "444"]));
    assert_eq!(limits["Max core file size"], json!(["0", "0"]));
    assert_eq!(limits["Max processes"], json!(["50", "60"]));
}

#[test]
fn a_seccomp_profile_is_enforced() {
    let test = fixture("seccomp");
    let profile = test.work.join("profile.json");
    let rules = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
            { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO" },
        ],
    });
    fs::write(&profile, rules.to_string()).unwrap();
    let script = "/probe errno mkdir /new; /probe errno sethostname x; /probe errno write /fine; grep Seccomp: /proc/self/status";
    let run = test.run("a", PROBE_IMAGE, &["sh", "-c", script]).with(&[
        "--seccomp",
        "--seccomp-profile",
        profile.to_str().unwrap(),
    ]);
    assert_eq!(run.finish().text(), "EOPNOTSUPP\nEPERM\nok\nSeccomp:\t2\n");
}

#[test]
fn a_user_is_looked_up_in_the_image() {
    let test = fixture("user-name");
    let seen = report(test.probe("a", &["report"]).with(&["--user", "tester"]).finish());
    assert_eq!(seen["status"]["Uid"], "1234\t1234\t1234\t1234");
    assert_eq!(seen["status"]["Gid"], "2345\t2345\t2345\t2345");
}

#[test]
fn labels_of_the_host_are_dropped() {
    let test = fixture("labels");
    let spec = |spec: Spec| {
        spec.set("/process/apparmorProfile", json!("profile-of-the-host"))
            .set(
                "/process/selinuxLabel",
                json!("system_u:system_r:container_t:s0:c1,c2"),
            )
            .set(
                "/linux/mountLabel",
                json!("system_u:object_r:container_file_t:s0"),
            )
    };
    let script = "echo here; cat /proc/self/attr/current 2>/dev/null || echo no label";
    let run = test.spec("a", &["sh", "-c", script], spec);
    assert_eq!(run.finish().text(), "here\nno label\n");
}
