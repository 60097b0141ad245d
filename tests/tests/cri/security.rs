//! Users, groups, capabilities, and what a container may not do.

use std::collections::BTreeSet;

use bulkhead_tests::cri;
use bulkhead_tests::cri::api::{Capability, SupplementalGroupsPolicy};
use bulkhead_tests::image::SETUID_IMAGE;
use serde_json::Value;

use crate::pods;

fn first(seen: &Value, field: &str) -> String {
    let text = seen["status"][field].as_str().unwrap();
    text.split_whitespace().next().unwrap_or_default().to_owned()
}

fn capabilities(seen: &Value) -> u64 {
    u64::from_str_radix(seen["status"]["CapEff"].as_str().unwrap(), 16).unwrap()
}

fn groups(seen: &Value) -> BTreeSet<String> {
    let text = seen["status"]["Groups"].as_str().unwrap();
    text.split_whitespace().map(str::to_owned).collect()
}

fn set(numbers: &[&str]) -> BTreeSet<String> {
    numbers.iter().map(ToString::to_string).collect()
}

#[test]
fn users_groups_and_roots_are_as_asked() {
    let test = pods("users");
    let pod = test.pod("pod").run();
    let number = pod
        .probe("number", &["tick"])
        .security(|security| {
            security.run_as_user = Some(cri::number(1234)).into();
            security.run_as_group = Some(cri::number(77)).into();
            security.supplemental_groups = vec![88, 99];
            security.readonly_rootfs = true;
        })
        .start();
    let seen = number.report();
    assert_eq!(
        (first(&seen, "Uid"), first(&seen, "Gid")),
        ("1234".into(), "77".into())
    );
    let merged = groups(&seen);
    assert!(merged.is_superset(&set(&["88", "99", "3456"])), "{merged:?}");
    let write = number.exec(&["/probe", "errno", "write", "/etc/new"]).text();
    assert_eq!(write, "EROFS\n");

    let name = pod
        .probe("name", &["tick"])
        .security(|security| security.run_as_username = "tester".into())
        .start();
    let seen = name.report();
    assert_eq!(
        (first(&seen, "Uid"), first(&seen, "Gid")),
        ("1234".into(), "2345".into())
    );
    assert_eq!(
        name.exec(&["/probe", "errno", "write", "/tmp/new"]).text(),
        "ok\n"
    );

    if !test.containerd.version.starts_with("1.") {
        let strict = pod
            .probe("strict", &["tick"])
            .security(|security| {
                security.run_as_user = Some(cri::number(1234)).into();
                security.run_as_group = Some(cri::number(77)).into();
                security.supplemental_groups = vec![88];
                security.supplemental_groups_policy = SupplementalGroupsPolicy::STRICT.into();
            })
            .start();
        let strict = groups(&strict.report());
        assert!(strict.contains("88") && !strict.contains("3456"), "{strict:?}");
    }
    // A group without a user is refused.
    let refused = pod
        .probe("refused", &["tick"])
        .security(|security| security.run_as_group = Some(cri::number(77)).into())
        .try_start();
    assert!(refused.is_err());
}

#[test]
fn capabilities_are_added_and_dropped() {
    let test = pods("capabilities");
    let pod = test.pod("pod").run();
    let with = |name: &str, add: &[&str], drop: &[&str]| {
        let container = pod
            .probe(name, &["tick"])
            .security(|security| {
                security.capabilities = Some(Capability {
                    add_capabilities: add.iter().map(ToString::to_string).collect(),
                    drop_capabilities: drop.iter().map(ToString::to_string).collect(),
                    ..Default::default()
                })
                .into();
            })
            .start();
        let seen = container.report();
        container.stop(0);
        capabilities(&seen)
    };
    let (chown, net_admin) = (1, 1 << 12);
    let plain = with("plain", &[], &[]);
    assert_eq!((plain & chown, plain & net_admin), (chown, 0));
    assert_eq!(with("added", &["NET_ADMIN"], &[]), plain | net_admin);
    assert_eq!(with("dropped", &[], &["CHOWN"]), plain & !chown);
    assert_eq!(with("none", &[], &["ALL"]), 0);
    let all = with("all", &["ALL"], &[]);
    assert!(
        all.count_ones() > plain.count_ones() && all & net_admin != 0,
        "{all:x}"
    );
}

#[test]
fn power_from_a_file_is_gained_unless_forbidden() {
    let test = pods("setuid");
    let pod = test.pod("pod").run();
    let effective = |name: &str, forbidden: bool| {
        let container = pod
            .container_of(SETUID_IMAGE, name, &["/probe", "tick"])
            .security(|security| {
                security.run_as_user = Some(cri::number(1234)).into();
                security.no_new_privs = forbidden;
            })
            .start();
        let seen = container.exec(&["/setuid", "report"]).json();
        let ids = seen["status"]["Uid"].as_str().unwrap();
        ids.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(effective("free", false), "0");
    assert_eq!(effective("bound", true), "1234");
}
