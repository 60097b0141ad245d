//! What the shim needs of the host besides KVM.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::report::{Report, Verdict};

#[cfg(test)]
mod tests;

const GROUP: &str = "Host";

/// Oldest kernel with everything the shim calls (`mount_setattr`, `cgroup.kill`): 5.14.
const MIN_KERNEL: (u32, u32) = (5, 14);

/// What the shim and the VMM take besides guest memory, in MiB, with room to spare.
const OVERHEAD_MIB: u64 = 64;

/// Controllers a pod's cgroup uses.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Adds the host's requirements for a guest of `memory_mib` MiB.
pub fn check(report: &mut Report, memory_mib: u32) {
    let root = nix::unistd::geteuid().is_root();
    report.add(
        GROUP,
        "root",
        if root { Verdict::Yes } else { Verdict::No },
        if root {
            ""
        } else {
            "the shim makes mounts, cgroups and network devices"
        },
        if root { "" } else { "run as root" },
    );
    check_kernel(report);
    check_memory(report, memory_mib);
    check_user_namespace(report);
    check_file_system(
        report,
        "overlay",
        "containerd's overlayfs snapshots are mounted by the shim",
    );
    check_tun(report);
    for module in ["sch_ingress", "cls_matchall", "act_mirred"] {
        check_module(report, module);
    }
    check_cgroup(report, Path::new("/sys/fs/cgroup"));
}

fn check_kernel(report: &mut Report) {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let new_enough = parse_release(&release).is_some_and(|version| version >= MIN_KERNEL);
    report.add(
        GROUP,
        format!("Linux {}.{} or newer", MIN_KERNEL.0, MIN_KERNEL.1),
        if new_enough { Verdict::Yes } else { Verdict::No },
        release,
        if new_enough { "" } else { "use a newer host kernel" },
    );
}

/// Major and minor version of a kernel release such as `6.12.9+deb13-amd64`.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn check_memory(report: &mut Report, memory_mib: u32) {
    let needed = u64::from(memory_mib) + OVERHEAD_MIB;
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let name = format!("{needed} MiB of free memory");
    match available_mib(&meminfo) {
        Some(available) if available >= needed => {
            report.add(
                GROUP,
                name,
                Verdict::Yes,
                format!("{available} MiB available"),
                "",
            );
        }
        Some(available) => report.add(
            GROUP,
            name,
            Verdict::No,
            format!("{available} MiB available for a guest of {memory_mib} MiB"),
            "free memory, or lower memory_mib in the configuration",
        ),
        None => report.add(
            GROUP,
            name,
            Verdict::Unknown,
            "/proc/meminfo has no MemAvailable",
            "mount /proc",
        ),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|kib| kib / 1024)
}

/// The complete jail of the VMM takes a user namespace; this version runs without. Tried, because half a
/// dozen switches can forbid it.
fn check_user_namespace(report: &mut Report) {
    let (verdict, reason, remedy) = match try_user_namespace() {
        Ok(()) => (Verdict::Yes, "one was made".to_owned(), ""),
        Err(error) => (
            Verdict::Missing,
            format!("the VMM's jail stays incomplete: {error}"),
            "sysctl user.max_user_namespaces=15000, and kernel.apparmor_restrict_unprivileged_userns=0 where it exists",
        ),
    };
    report.add(GROUP, "user namespaces", verdict, reason, remedy);
}

/// Starts this program in a new user namespace; it prints its version to nowhere and ends.
fn try_user_namespace() -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| unshare(CloneFlags::CLONE_NEWUSER).map_err(io::Error::from));
    }
    command.spawn()?.wait().map(|_| ())
}

fn check_file_system(report: &mut Report, name: &'static str, reason: &str) {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let available = lists_file_system(&known, name) || module_available(name);
    report.add(
        GROUP,
        format!("{name} file system"),
        if available { Verdict::Yes } else { Verdict::No },
        reason,
        if available {
            String::new()
        } else {
            format!("modprobe {name}")
        },
    );
}

fn lists_file_system(filesystems: &str, name: &str) -> bool {
    filesystems
        .lines()
        .any(|line| line.split_whitespace().last() == Some(name))
}

fn check_tun(report: &mut Report) {
    const DEVICE: &str = "/dev/net/tun";
    let (verdict, reason, remedy) = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => (
            Verdict::Yes,
            "the guest's network card is a tap device".to_owned(),
            "",
        ),
        Err(error) => (
            Verdict::No,
            format!("no tap device for the guest's network card: {error}"),
            "modprobe tun, as root",
        ),
    };
    report.add(GROUP, DEVICE, verdict, reason, remedy);
}

/// What joins a pod's interface to its guest.
fn check_module(report: &mut Report, name: &'static str) {
    let available = module_available(name);
    report.add(
        GROUP,
        name,
        if available { Verdict::Yes } else { Verdict::No },
        "the pod's interface is joined to the tap by tc",
        if available {
            String::new()
        } else {
            format!("modprobe {name}, or a host kernel that has it")
        },
    );
}

/// Whether a kernel module is loaded, built in, or there to be loaded.
fn module_available(name: &str) -> bool {
    if Path::new("/sys/module").join(name).exists() {
        return true;
    }
    let Ok(kernel) = nix::sys::utsname::uname() else {
        return false;
    };
    let release = kernel.release().to_string_lossy().into_owned();
    ["/lib/modules", "/usr/lib/modules"].iter().any(|root| {
        ["modules.builtin", "modules.dep"].iter().any(|list| {
            fs::read_to_string(Path::new(root).join(&release).join(list))
                .is_ok_and(|text| lists_module(&text, name))
        })
    })
}

/// Whether a list of module files has one of that name; `-` and `_` are the same in module names.
fn lists_module(list: &str, name: &str) -> bool {
    list.lines().any(|line| {
        let file = line
            .split(':')
            .next()
            .unwrap_or_default()
            .rsplit('/')
            .next()
            .unwrap_or_default();
        let stem = file.split(".ko").next().unwrap_or_default();
        stem.replace('-', "_") == name
    })
}

/// Without cgroup v2 a pod runs in its caller's cgroup, neither accounted nor limited on the host.
fn check_cgroup(report: &mut Report, root: &Path) {
    const MOUNT: &str = "boot the host with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there";
    let name = format!("cgroup v2 at {}", root.display());
    let controllers = match fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(controllers) => controllers,
        Err(error) => {
            let reason = format!("a pod is not accounted for on the host: {error}");
            report.add(GROUP, name, Verdict::Missing, reason, MOUNT);
            return;
        }
    };
    let absent: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|wanted| !controllers.split_whitespace().any(|found| found == *wanted))
        .collect();
    let (verdict, reason, remedy) = match (absent.as_slice(), try_cgroup(root)) {
        (_, Err(error)) => (
            Verdict::No,
            format!("no cgroup can be made: {error}"),
            "run as root, on a writable cgroup mount",
        ),
        ([], Ok(())) => (Verdict::Yes, controllers.trim().to_owned(), ""),
        (absent, Ok(())) => (
            Verdict::Missing,
            format!("without {} a pod cannot be limited by it", absent.join(", ")),
            "enable the controllers on the kernel command line (cgroup_disable=, systemd)",
        ),
    };
    report.add(GROUP, name, verdict, reason, remedy);
}

/// Makes a cgroup and removes it.
fn try_cgroup(root: &Path) -> io::Result<()> {
    let directory = root.join(format!("bulkhead-check-{}", std::process::id()));
    fs::create_dir(&directory)?;
    fs::remove_dir(&directory)
}
