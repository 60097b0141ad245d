//! Pods whose VMs begin from one template.

use std::collections::HashSet;

use crate::pods;

#[test]
fn pods_of_one_template_have_names_addresses_and_secrets_of_their_own() {
    let test = pods("template");
    // The first pod of its shape may be the one that leaves the template.
    let pods = ["first", "second", "third"].map(|name| test.pod(name).run());
    let script = "cat /sys/class/net/eth0/address /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
                  hostname; ip -4 -o address show dev eth0 | awk '{ print $4 }'";
    let seen = pods
        .each_ref()
        .map(|pod| pod.container("main", &["sh", "-c", script]).finish().text());
    let lines = seen.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    for number in 0..5 {
        let different: HashSet<&str> = lines.iter().map(|lines| lines[number]).collect();
        assert_eq!(different.len(), 3, "line {number} of {seen:?}");
    }
    for (pod, lines) in pods.iter().zip(&lines) {
        assert_eq!(lines[3], pod.config.hostname);
        assert!(lines[4].starts_with(&pod.ip()), "{lines:?}");
    }
    // They reach each other.
    let target = pods[0].ip();
    let ping = format!("ping -c 1 -W 5 {target}");
    for pod in &pods[1..] {
        let done = pod.container("ping", &["sh", "-c", &ping]).finish();
        assert_eq!(done.code, 0, "{done:?}");
    }
}
