//! What the shim needs of the host besides KVM.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use bulkhead_sandbox::config::Wall;
use bulkhead_sandbox::error::chain as error_chain;
use bulkhead_sandbox::jail::{Jail, JailError};
use bulkhead_sandbox::journal;
use bulkhead_sandbox::spawn::{self, Ending, Program, SpawnError};
use nix::errno::Errno;

use super::report::{Report, Verdict};

#[cfg(test)]
mod tests;

const GROUP: &str = "Host";

/// Oldest kernel with everything the shim calls (`mount_setattr`, `cgroup.kill`): 5.14.
const MIN_KERNEL: (u32, u32) = (5, 14);

/// What the shim and the VMM take besides guest memory, in MiB, with room to spare.
const OVERHEAD_MIB: u64 = 64;

/// How long a process in a jail may take to do nothing.
const TRIAL_TIME: Duration = Duration::from_secs(10);

/// Controllers a pod's cgroup uses.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Adds the host's requirements for a guest of `memory_mib` MiB, whose VMM may do without the walls `weaker` of its jail.
pub fn check(report: &mut Report, memory_mib: u32, weaker: &[Wall]) {
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
    check_jail(report, weaker);
    check_file_system(
        report,
        "overlay",
        "containerd's overlayfs snapshots are mounted by the shim",
    );
    check_tun(report);
    check_vhost(report);
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

/// What of the VMM's jail the host has to give: a process in namespaces of its own is made as the shim makes a VMM,
/// because half a dozen switches can forbid it.
fn check_jail(report: &mut Report, weaker: &[Wall]) {
    let accepted = weaker.contains(&Wall::UserNamespace);
    namespaces(report, try_jail(!accepted), accepted);
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    seccomp(
        report,
        &actions.unwrap_or_default(),
        weaker.contains(&Wall::Seccomp),
    );
    landlock(report, bulkhead_vmm::jail::landlock::version());
}

/// Why no process can be jailed here.
#[derive(Debug, thiserror::Error)]
enum TrialError {
    /// A file.
    #[error("Cannot open {0}")]
    Open(&'static str, #[source] io::Error),
    /// The process.
    #[error(transparent)]
    Spawn(SpawnError),
    /// It was made, and did not run.
    #[error("The process ended with {0:?}")]
    Ended(Option<Ending>),
}

/// Starts this program as a VMM is started; it prints its version to nowhere and ends.
fn try_jail(user_namespace: bool) -> Result<(), TrialError> {
    const PROGRAM: &str = "/proc/self/exe";
    const NULL: &str = "/dev/null";
    let open =
        |path, options: &OpenOptions| options.open(path).map_err(|error| TrialError::Open(path, error));
    let program = open(PROGRAM, OpenOptions::new().read(true))?;
    let null = open(NULL, OpenOptions::new().read(true).write(true))?;
    let process = spawn::spawn(&Program {
        executable: program.as_fd(),
        arguments: vec![c"bulkhead".into(), c"--version".into()],
        environment: Vec::new(),
        descriptors: (0..3).map(|number| (null.as_fd(), number)).collect(),
        jail: Some(Jail {
            root: None,
            user_namespace,
        }),
    })
    .map_err(TrialError::Spawn)?;
    if !journal::wait_for_end(&process.pidfd, TRIAL_TIME) {
        let _ = spawn::pidfd_kill(&process.pidfd);
        let _ = journal::wait_for_end(&process.pidfd, TRIAL_TIME);
    }
    match spawn::reap(process.pidfd.as_fd()) {
        Ok(Some(Ending::Exited(0))) => Ok(()),
        ending => Err(TrialError::Ended(ending.ok().flatten())),
    }
}

/// What the trial of a jail says. `accepted`: the configuration is content without a user namespace, and the trial was
/// without.
fn namespaces(report: &mut Report, trial: Result<(), TrialError>, accepted: bool) {
    let name = "user namespaces";
    let error = match trial {
        Ok(()) if accepted => {
            let reason = "weaker_jail leaves them out of the VMM's jail";
            report.add(GROUP, name, Verdict::Missing, reason, "");
            return;
        }
        Ok(()) => {
            report.add(GROUP, name, Verdict::Yes, "a process was jailed in one", "");
            return;
        }
        Err(error) => error,
    };
    let TrialError::Spawn(SpawnError::Jail(JailError::UserNamespace(errno))) = error else {
        let reason = format!("no process could be jailed: {}", error_chain(&error));
        report.add(GROUP, "namespaces", Verdict::No, reason, "");
        return;
    };
    let read = |name: &str| {
        let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        text.trim().parse().ok()
    };
    let remedy = Switches::read(read).remedy(errno);
    let reason = format!("the VMM's jail has one of its own: {}", errno.desc());
    report.add(GROUP, name, Verdict::No, reason, remedy);
}

/// The host's switches that can keep root from a user namespace.
#[derive(Clone, Copy, Debug, Default)]
struct Switches {
    /// `user.max_user_namespaces`; absent: the kernel was built without them.
    most: Option<u64>,
    /// Debian's `kernel.unprivileged_userns_clone` is 0: only who has `CAP_SYS_ADMIN` makes one.
    privileged_only: bool,
    /// Ubuntu's `kernel.apparmor_restrict_unprivileged_userns` is 1: a process under an AppArmor profile that does not
    /// allow it, or without power, makes none, or none of use.
    apparmor: bool,
}

impl Switches {
    fn read(read: impl Fn(&str) -> Option<u64>) -> Self {
        Self {
            most: read("user/max_user_namespaces"),
            privileged_only: read("kernel/unprivileged_userns_clone") == Some(0),
            apparmor: read("kernel/apparmor_restrict_unprivileged_userns") == Some(1),
        }
    }

    /// What to change when unshare(2) fails with `errno`.
    fn remedy(self, errno: Errno) -> String {
        let raise = "sysctl -w user.max_user_namespaces=15000, and the same in /etc/sysctl.d";
        match (self.most, errno) {
            (None, _) | (_, Errno::EINVAL | Errno::ENOSYS) => {
                "use a host kernel with CONFIG_USER_NS, and without a parameter that switches it off".into()
            }
            (Some(0), _) => format!("user.max_user_namespaces is 0: {raise}"),
            // They are counted for each owner (namespaces(7)).
            (Some(most), Errno::ENOSPC) => {
                format!("all {most} of user.max_user_namespaces are in use: {raise}")
            }
            (_, Errno::EUSERS) => "run on the host: user namespaces are nested too deeply here".into(),
            _ => {
                let mut hints = Vec::new();
                if self.privileged_only {
                    hints.push("sysctl -w kernel.unprivileged_userns_clone=1");
                }
                if self.apparmor {
                    hints.push("sysctl -w kernel.apparmor_restrict_unprivileged_userns=0");
                }
                hints.push(
                    "run containerd with CAP_SYS_ADMIN, outside any container, seccomp filter or AppArmor profile that forbids unshare(2)",
                );
                hints.join(", or ")
            }
        }
    }
}

/// `actions`: those the kernel has for a filter of system calls (seccomp(2)).
fn seccomp(report: &mut Report, actions: &str, accepted: bool) {
    let name = "seccomp filters";
    if actions.split_whitespace().any(|action| action == "kill_process") {
        report.add(
            GROUP,
            name,
            Verdict::Yes,
            "the VMM has one for each kind of thread",
            "",
        );
        return;
    }
    let (verdict, reason) = if accepted {
        (Verdict::Missing, "weaker_jail accepts a VMM without")
    } else {
        (Verdict::No, "the VMM is confined to the system calls it needs")
    };
    report.add(
        GROUP,
        name,
        verdict,
        reason,
        "use a host kernel with CONFIG_SECCOMP_FILTER",
    );
}

fn landlock(report: &mut Report, version: u32) {
    let (verdict, reason, remedy) = if version >= 2 {
        (Verdict::Yes, format!("version {version} of its interface"), "")
    } else {
        (
            Verdict::Missing,
            "a second wall around files and network of the VMM is not there".to_owned(),
            "use Linux 5.19 or newer with CONFIG_SECURITY_LANDLOCK, and landlock in the kernel parameter lsm= if there is one",
        )
    };
    report.add(GROUP, "Landlock", verdict, reason, remedy);
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

/// What saves frames the way through the VMM.
fn check_vhost(report: &mut Report) {
    const DEVICE: &str = "/dev/vhost-net";
    let (verdict, reason, remedy) = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => (
            Verdict::Yes,
            "the host's kernel carries the guest's frames".to_owned(),
            "",
        ),
        Err(error) => (
            Verdict::Missing,
            format!("the VMM carries the guest's frames by itself: {error}"),
            "modprobe vhost_net, as root",
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
