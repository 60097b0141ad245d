use bulkhead_protocol::agent as proto;
use serde_json::{Value, json};

use crate::harness::{Guest, Outcome};
use crate::specs::{process, script, spec};

async fn output(guest: &Guest, spec: &Value) -> String {
    let Outcome {
        status,
        stdout,
        stderr,
    } = guest.run("c", spec, None).await.unwrap();
    assert_eq!((status, stderr.as_str()), (0, ""), "{stdout}");
    stdout
}

pub async fn namespaces_and_names(guest: &Guest) {
    let mut spec = script(
        "hostname; set -- /proc/[0-9]*; echo $#; grep ^0 /proc/self/cgroup; ls /sys/class/net; ls / | tr '\\n' ' '",
    );
    let seen = output(guest, &spec).await;
    assert_eq!(seen, "pod-host\n1\n0::/\nlo\nbin dev etc proc sys tmp ");
    spec["hostname"] = json!("own-name");
    assert!(output(guest, &spec).await.starts_with("own-name\n"));
    // Without a pid namespace of its own a container sees the guest's processes.
    let mut spec = script("cat /proc/1/comm");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert_ne!(output(guest, &spec).await, "cat\n");
}

pub async fn users_and_capabilities(guest: &Guest) {
    let mut spec = script("id; grep -E 'Cap(Eff|Bnd|Inh|Amb)|NoNewPrivs' /proc/self/status; echo ~; pwd");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [1000, 5, 27]});
    spec["process"]["cwd"] = json!("/tmp");
    spec["process"]["noNewPrivileges"] = json!(true);
    let seen = output(guest, &spec).await;
    assert!(
        seen.starts_with("uid=1000(user) gid=1000(user) groups=5,27,1000(user)\n"),
        "{seen}"
    );
    assert!(
        seen.contains("NoNewPrivs:\t1") && seen.contains("CapEff:\t0000000000000000"),
        "{seen}"
    );
    assert!(seen.contains("CapBnd:\t00000000a80425fb"), "{seen}");
    assert!(seen.ends_with("/home/user\n/tmp\n"), "{seen}");
    let seen = output(guest, &script("grep -E 'Cap(Eff|Inh|Amb)' /proc/self/status")).await;
    assert_eq!(
        seen,
        "CapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\nCapAmb:\t0000000000000000\n"
    );
    // Absent capabilities are none.
    let mut spec = script("grep CapEff /proc/self/status");
    spec["process"]["capabilities"] = json!(null);
    assert_eq!(output(guest, &spec).await, "CapEff:\t0000000000000000\n");
}

pub async fn seccomp_also_for_additional_processes(guest: &Guest) {
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}],
    });
    guest.create("c", &spec, &proto::Streams::new()).await.unwrap();
    guest.start("c").await.unwrap();
    for (exec, nnp, uid) in [
        ("a", false, 0),
        ("b", true, 0),
        ("c", false, 1000),
        ("d", true, 1000),
    ] {
        let mut process = process(&[
            "sh",
            "-c",
            "grep -E 'Seccomp:|CapEff|CapBnd|CapPrm' /proc/self/status; mkdir /tmp/x",
        ]);
        process["noNewPrivileges"] = json!(nnp);
        process["user"] = json!({"uid": uid, "gid": uid});
        let outcome = guest.run_exec("c", exec, &process).await.unwrap();
        let effective = if uid == 0 {
            "00000000a80425fb"
        } else {
            "0000000000000000"
        };
        let expected =
            format!("CapPrm:\t{effective}\nCapEff:\t{effective}\nCapBnd:\t00000000a80425fb\nSeccomp:\t2\n");
        assert_eq!(outcome.stdout, expected, "{exec}: {}", outcome.stderr);
        assert!(
            outcome.stderr.contains("Cannot assign requested address"),
            "{exec}: {}",
            outcome.stderr
        );
    }
}

pub async fn paths_limits_and_parameters(guest: &Guest) {
    let mut spec = script(
        "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; cat /proc/uptime | wc -c; \
         (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo read-only; cat /proc/sys/net/ipv4/ip_default_ttl; \
         touch /x 2>/dev/null || echo root read-only; echo $WHO; ls -d /data/sub; touch /data/y 2>/dev/null || echo data read-only",
    );
    spec["root"]["readonly"] = json!(true);
    spec["process"]["oomScoreAdj"] = json!(777);
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_default_ttl": "77"});
    std::fs::create_dir_all(guest.guest_file("/run/bulkhead/shared/data/sub")).unwrap();
    std::fs::create_dir_all(guest.guest_file("/run/bulkhead/shared/rootfs/data")).unwrap();
    let bind = json!({"destination": "/data", "type": "bind", "source": "/run/bulkhead/shared/data", "options": ["rbind", "rprivate", "ro"]});
    spec["mounts"].as_array_mut().unwrap().push(bind);
    let seen = output(guest, &spec).await;
    assert_eq!(
        seen,
        "1024\n1234\n777\n0\nread-only\n77\nroot read-only\ntest\n/data/sub\ndata read-only\n"
    );
    assert_eq!(
        output(guest, &script("cat /proc/self/oom_score_adj")).await,
        "0\n"
    );
}

pub async fn devices_are_filtered(guest: &Guest) {
    let text = "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; \
        mknod /tmp/fuse c 10 229; (: < /tmp/fuse) 2>&1 | grep -c 'not permitted'; rm /tmp/fuse";
    assert_eq!(output(guest, &script(text)).await, "4\n4\n1\n");
    // Allowed by a rule of the specification.
    let mut spec = script(text);
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
    ]);
    assert_eq!(output(guest, &spec).await, "4\n4\n0\n");
}

pub async fn standard_output_can_be_opened_by_name(guest: &Guest) {
    for uid in [0, 1000] {
        let mut spec = script("echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin");
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        let outcome = guest.run("c", &spec, Some(b"in")).await.unwrap();
        assert_eq!(
            outcome,
            Outcome {
                status: 0,
                stdout: "out\nin".into(),
                stderr: "err\n".into()
            }
        );
    }
}
