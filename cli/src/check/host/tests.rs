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

fn refused(errno: Errno) -> Result<(), TrialError> {
    Err(TrialError::Spawn(SpawnError::Jail(JailError::UserNamespace(
        errno,
    ))))
}

#[test]
fn a_host_without_user_namespaces_runs_no_pod_unless_that_is_accepted() {
    let mut report = Report::default();
    namespaces(&mut report, refused(Errno::EPERM), false);
    assert_eq!(report.failed().len(), 1, "{}", report.text());
    assert!(
        report.text().contains("Operation not permitted"),
        "{}",
        report.text()
    );
    assert!(!report.failed()[0].remedy.is_empty());
    for (accepted, word) in [(false, "yes"), (true, "missing")] {
        let mut report = Report::default();
        namespaces(&mut report, Ok(()), accepted);
        assert!(
            report.ready() && report.text().contains(word),
            "{}",
            report.text()
        );
    }
    // Without a user namespace the others are needed all the same.
    let mut report = Report::default();
    let none = SpawnError::Namespaces(Errno::ENOSPC);
    namespaces(&mut report, Err(TrialError::Spawn(none)), true);
    assert!(!report.ready());
    assert!(report.text().contains("max_pid_namespaces"), "{}", report.text());
}

#[test]
fn the_remedy_names_the_switch_that_is_off() {
    let host = |switches: &'static [(&'static str, u64)]| {
        Switches::read(move |name| {
            switches
                .iter()
                .find(|(switch, _)| *switch == name)
                .map(|(_, value)| *value)
        })
    };
    const MOST: &str = "user/max_user_namespaces";
    for (switches, errno, said, unsaid) in [
        (&[][..], Errno::EINVAL, "CONFIG_USER_NS", "sysctl"),
        (&[(MOST, 100)], Errno::EINVAL, "CONFIG_USER_NS", "sysctl"),
        (
            &[(MOST, 0)],
            Errno::ENOSPC,
            "user.max_user_namespaces is 0: sysctl -w user.max",
            "in use",
        ),
        (
            &[(MOST, 7)],
            Errno::ENOSPC,
            "all 7 of user.max_user_namespaces are in use",
            "apparmor",
        ),
        (&[(MOST, 7)], Errno::EUSERS, "nested too deeply", "sysctl"),
        (&[(MOST, 7)], Errno::EPERM, "CAP_SYS_ADMIN", "sysctl"),
        (
            &[(MOST, 7), ("kernel/unprivileged_userns_clone", 0)],
            Errno::EPERM,
            "kernel.unprivileged_userns_clone=1",
            "apparmor_restrict",
        ),
        (
            &[(MOST, 7), ("kernel/apparmor_restrict_unprivileged_userns", 1)],
            Errno::EACCES,
            "kernel.apparmor_restrict_unprivileged_userns=0",
            "unprivileged_userns_clone",
        ),
    ] {
        let remedy = host(switches).remedy(errno);
        assert!(
            remedy.contains(said) && !remedy.contains(unsaid),
            "{switches:?} {errno}: {remedy}"
        );
    }
}

#[test]
fn the_trial_of_a_jail_runs_a_program_or_says_why_not() {
    // This test's program in the place of the command line: it knows no --version and fails, but it ran.
    match try_jail(true) {
        Err(TrialError::Ended(Some(Ending::Exited(code)))) => assert_ne!(code, 127),
        Err(TrialError::Spawn(error)) => assert!(
            !nix::unistd::geteuid().is_root() || matches!(error, SpawnError::Jail(_)),
            "{error:?}"
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn filters_of_system_calls_are_required_and_landlock_is_not() {
    for (actions, accepted, ready) in [
        ("kill_process kill_thread trap errno", false, true),
        ("kill_thread trap errno", false, false),
        ("", false, false),
        ("", true, true),
    ] {
        let mut report = Report::default();
        seccomp(&mut report, actions, accepted);
        assert_eq!(report.ready(), ready, "{actions:?}: {}", report.text());
    }
    for (version, word) in [(0, "missing"), (1, "missing"), (6, "yes")] {
        let mut report = Report::default();
        landlock(&mut report, version);
        assert!(
            report.ready() && report.text().contains(word),
            "{}",
            report.text()
        );
    }
}
