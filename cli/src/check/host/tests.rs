use super::*;

#[test]
fn kernel_releases_are_compared_by_number() {
    assert_eq!(parse_release("6.12.9+deb13-amd64"), Some((6, 12)));
    assert_eq!(parse_release("5.4.0-generic"), Some((5, 4)));
    assert_eq!(parse_release("6.6-rc1"), Some((6, 6)));
    assert_eq!(parse_release("linux"), None);
    assert!(parse_release("5.4.0").unwrap() < MIN_KERNEL);
    assert!(parse_release("6.1.0").unwrap() >= MIN_KERNEL);
}

#[test]
fn available_memory_is_read_in_mib() {
    assert_eq!(
        available_mib("MemTotal:  100 kB\nMemAvailable:    2097152 kB\n"),
        Some(2048)
    );
    assert_eq!(available_mib("MemTotal: 100 kB\n"), None);
    assert_eq!(available_mib("MemAvailable: lots\n"), None);
}

#[test]
fn more_memory_than_there_is_is_a_failed_requirement() {
    let mut report = Report::default();
    check_memory(&mut report, u32::MAX);
    assert_eq!(report.failed().len(), 1, "{}", report.text());
}

#[test]
fn file_systems_match_by_whole_name() {
    let list = "nodev\tsysfs\n\text4\nnodev\toverlay\n";
    assert!(lists_file_system(list, "overlay"));
    assert!(lists_file_system(list, "ext4"));
    assert!(!lists_file_system(list, "over"));
    assert!(!lists_file_system(list, "nodev"));
}

#[test]
fn modules_match_by_whole_name_in_both_lists() {
    let dep = "kernel/net/sched/act_mirred.ko.xz: kernel/a.ko.xz\nkernel/drivers/vhost/vhost-net.ko:\n";
    assert!(lists_module(dep, "act_mirred"));
    assert!(lists_module(dep, "vhost_net"));
    assert!(!lists_module(dep, "mirred"));
    assert!(lists_module("kernel/net/sched/sch_ingress.ko\n", "sch_ingress"));
}

#[test]
fn no_cgroup_mount_is_missing_but_does_not_forbid_pods() {
    let mut report = Report::default();
    check_cgroup(&mut report, Path::new("/nonexistent"));
    assert!(report.failed().is_empty(), "{}", report.text());
    assert!(report.text().contains("missing"), "{}", report.text());
}

#[test]
fn cgroup_controllers_are_compared_and_the_trial_leaves_nothing() {
    let directory = std::env::temp_dir().join(format!("bulkhead-check-test-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    fs::write(
        directory.join("cgroup.controllers"),
        "cpuset cpu io memory pids\n",
    )
    .unwrap();
    let mut report = Report::default();
    check_cgroup(&mut report, &directory);
    assert!(report.ready(), "{}", report.text());
    assert_eq!(
        fs::read_dir(&directory).unwrap().count(),
        1,
        "the trial cgroup is removed"
    );
    fs::write(directory.join("cgroup.controllers"), "cpu memory\n").unwrap();
    let mut report = Report::default();
    check_cgroup(&mut report, &directory);
    assert!(
        report.text().contains("without cpuset, io, pids"),
        "{}",
        report.text()
    );
    fs::remove_dir_all(&directory).unwrap();
}
