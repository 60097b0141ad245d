//! The VMM of a running container, seen from the host: what it holds, and what it is kept from.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_tests::{Fixture, host};

use crate::fixture;

mod inside;

/// Capabilities the file server needs for files of every owner: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID,
/// MKNOD, SETFCAP.
const FILE_SERVER: &str = "00000000880000db";

/// Largest file in bytes that the VMM makes, for whomever: 16 TiB.
const FILE_SIZE: &str = "17592186044416";

/// Beginnings of the names of what it makes of its own, and of streams.
const GIVEN: [&str; 6] = [
    "anon_inode:kvm-vm",
    "anon_inode:kvm-vcpu:",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[timerfd]",
    "socket:",
];

/// The VMM of a container that runs with a volume, and what else there is of it.
struct Running {
    test: Fixture,
    id: String,
    shim: i32,
    vmm: i32,
}

impl Running {
    fn new(name: &'static str) -> Self {
        let test = fixture(name);
        let mount = format!(
            "type=bind,src={},dst=/volume,options=rbind:rw",
            test.work.display()
        );
        let id = test
            .busybox("a", &["sleep", "1000"])
            .with(&["--mount", &mount])
            .detach();
        let (shim, _) = test.task(&id).unwrap();
        let vmms = host::vmms_of(shim);
        assert_eq!(vmms.len(), 1);
        let vmm = vmms[0];
        Self { test, id, shim, vmm }
    }

    fn of(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.vmm.to_string()).join(file)
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.of(file)).unwrap()
    }

    fn end(self) {
        self.test.kill_and_remove(&self.id);
    }
}

/// The value of `key` in a file such as `/proc/<pid>/status`.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    found.unwrap_or_else(|| panic!("no {key} in {text}")).trim()
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

#[test]
fn the_vmm_has_no_power_over_the_host() {
    let running = Running::new("jail-power");
    let (shim, vmm) = (running.shim.to_string(), running.vmm.to_string());
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let own = namespace(&vmm, kind);
        assert_ne!(own, namespace("self", kind), "{kind} namespace of the host");
        assert_ne!(own, namespace(&shim, kind), "{kind} namespace of the shim");
    }
    for map in ["uid_map", "gid_map"] {
        let text = running.read(map);
        let columns: Vec<_> = text.split_whitespace().collect();
        assert_eq!(columns, ["0", "0", "4294967295"], "{map}");
    }
    // Every thread by itself.
    let mut names = BTreeSet::new();
    for task in fs::read_dir(running.of("task")).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(task.join("status")).unwrap();
        for (key, expected) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", FILE_SERVER),
            ("CapBnd", FILE_SERVER),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Groups", ""),
        ] {
            assert_eq!(value(&status, key), expected, "{key} of {name}");
        }
        // The first process of a pid namespace.
        let ids: Vec<_> = value(&status, "NSpid").split_whitespace().collect();
        assert_eq!(ids.len(), 2, "{name}: {ids:?}");
        assert_eq!(value(&status, "NStgid").split_whitespace().last(), Some("1"));
        names.insert(name);
    }
    for name in ["vcpu0", "fs0"] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    assert_eq!(
        running.read("cgroup"),
        fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap()
    );
    let limits = running.read("limits");
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..]
            .split_whitespace()
            .take(2)
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max locked memory"), ["0", "0"]);
    assert_eq!(limit("Max file size"), [FILE_SIZE, FILE_SIZE]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1]);
    assert!(files[0].parse::<u64>().unwrap() <= 1 << 20, "{files:?}");
    running.end();
}

#[test]
fn a_file_ends_at_the_limit_and_the_vm_does_not() {
    let test = fixture("jail-file-size");
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        test.work.display()
    );
    // Where the largest file ends, made longer, written beyond, and what is written last in it.
    let script = format!(
        "cd /volume; truncate -s {FILE_SIZE} file && echo whole; \
         truncate -s {FILE_SIZE}1 file 2>&1; \
         echo x | dd of=file bs=1 count=1 seek={FILE_SIZE} conv=notrunc 2>&1; \
         echo x | dd of=file bs=1 count=1 seek=17592186044415 conv=notrunc 2>/dev/null && echo last; \
         stat -c %s file; tail -c 1 file; echo; rm file"
    );
    let said = test
        .busybox("a", &["sh", "-c", &script])
        .with(&["--mount", &mount])
        .finish()
        .text();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.first(), Some(&"whole"), "{said}");
    assert_eq!(said.matches("File too large").count(), 2, "{said}");
    assert!(said.ends_with(&format!("last\n{FILE_SIZE}\nx\n")), "{said}");
}

#[test]
fn the_vmm_sees_the_shared_tree_and_no_network() {
    let running = Running::new("jail-mounts");
    // Of the network there is the loopback interface, and it is down.
    let links = running.read("net/dev");
    let links: Vec<_> = links
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    assert_eq!(links, ["lo"]);
    let name = running.read("environ");
    assert_eq!(name, "");

    // mount_namespaces(7), proc_pid_mountinfo(5): number, parent, device, root, place, options, tags …, "-", type, source.
    let mounts = running.read("mountinfo");
    let mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
    let root = &mounts[0];
    assert_eq!(root[4], "/", "{root:?}");
    assert!(root[5].split(',').any(|option| option == "ro"), "{root:?}");
    assert!(root.iter().any(|field| field.starts_with("master:")), "{root:?}");
    assert!(!root.iter().any(|field| field.starts_with("shared:")), "{root:?}");
    assert_eq!(
        root[root.len() - 3..root.len() - 1],
        ["tmpfs", "bulkhead"],
        "{root:?}"
    );
    // All others are those of the shim's tree: they came after the VMM had begun, and nothing of the host came along.
    let shims = fs::read_to_string(format!("/proc/{}/mountinfo", running.shim)).unwrap();
    let places: BTreeSet<&str> = shims
        .lines()
        .filter_map(|line| line.split(' ').nth(4)?.split_once("/shared/"))
        .map(|(_, below)| below)
        .collect();
    let seen: BTreeSet<&str> = mounts[1..].iter().map(|mount| &mount[4][1..]).collect();
    assert!(seen.len() >= 2, "root file system and volume: {seen:?}");
    assert_eq!(seen, places);
    for mount in &mounts[1..] {
        for option in ["nosuid", "nodev", "noexec"] {
            assert!(mount[5].split(',').any(|has| has == option), "{mount:?}");
        }
    }
    // The same directory, looked into from outside.
    let entries = |path: PathBuf| -> BTreeSet<_> {
        let entries = fs::read_dir(path).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    for outside in ["proc", "dev", "etc", "sys", "run", "usr"] {
        assert!(
            !entries(running.of("root")).contains(std::ffi::OsStr::new(outside)),
            "{outside}"
        );
    }
    running.end();
}

/// Whether a descriptor was opened for reading alone (proc_pid_fdinfo(5)).
fn is_read_only(running: &Running, number: i32) -> bool {
    let info = running.read(&format!("fdinfo/{number}"));
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDONLY)
}

#[test]
fn the_vmm_holds_what_it_was_given() {
    let running = Running::new("jail-descriptors");
    let mut strange = Vec::new();
    let own_root = fs::metadata(running.of("root")).unwrap().dev();
    for entry in fs::read_dir(running.of("fd")).unwrap() {
        let path = entry.unwrap().path();
        let target = fs::read_link(&path).unwrap().to_string_lossy().into_owned();
        let number: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let expected = match number {
            // From the namespace of another process a path can begin farther up.
            0 | 1 => target.ends_with("/dev/null"),
            2 => target.starts_with("pipe:"),
            3 => target.starts_with("socket:"),
            // Its own descriptors, in a procfs that is mounted nowhere.
            4 => target == "/1/fd",
            _ => {
                GIVEN.iter().any(|kind| target.starts_with(kind))
                    || target == "/1/fd"
                    || target.ends_with("/dev/net/tun")
                    || target.ends_with("/dev/vhost-net")
                    // The far ends of streams.
                    || target.contains("/fifo")
                    || target.ends_with("/dev/null")
                    // Memory of the template it began from, which it cannot write.
                    || (target.ends_with("/memory") && is_read_only(&running, number))
                    // Room for the list of open files while the VM is written down.
                    || target == "/memfd:files (deleted)"
                    // The tree, and what is mounted in it.
                    || target == "/"
                    || fs::metadata(&path).is_ok_and(|file| file.dev() == own_root)
                    || is_below_root(&running, number)
            }
        };
        if !expected {
            strange.push(format!("{number}: {target}"));
        }
    }
    assert!(strange.is_empty(), "{strange:?}");
    // Guest memory is in no dump: every large mapping that is not a file's.
    let maps = running.read("smaps");
    let mut large = 0;
    let mut size = 0;
    for line in maps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && size >= 64 << 10
            && flags.split_whitespace().any(|flag| flag == "wr")
        {
            large += 1;
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }
    assert!(large >= 1, "{maps}");
    running.end();
}

/// Whether a descriptor is of a mount that the VMM sees.
fn is_below_root(running: &Running, number: i32) -> bool {
    let info = running.read(&format!("fdinfo/{number}"));
    let id = value(&info, "mnt_id");
    running
        .read("mountinfo")
        .lines()
        .any(|mount| mount.split(' ').next() == Some(id))
}

#[test]
fn a_host_without_user_namespaces_is_told_what_to_change() {
    let test = fixture("jail-refused");
    let limit = Path::new("/proc/sys/user/max_user_namespaces");
    let before = fs::read_to_string(limit).unwrap();
    fs::write(limit, "0").unwrap();
    let refused = test.busybox("a", &["true"]).finish();
    let weaker = test.configuration(&[("weaker_jail", serde_json::json!(["user_namespace", "seccomp"]))]);
    let accepted = test
        .busybox("b", &["echo", "up"])
        .with(&["--runtime-config-path", &weaker])
        .finish();
    fs::write(limit, before).unwrap();
    for hint in ["user namespace", "user.max_user_namespaces", "weaker_jail"] {
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains(hint), "no {hint:?} in {refused}");
    }
    assert_eq!(accepted.text(), "up\n");
    let logs = test.logs();
    for wall in ["UserNamespace", "Seccomp"] {
        assert!(
            logs.contains(&format!("the configuration leaves {wall} out of the VMM's jail")),
            "{logs}"
        );
    }
}
