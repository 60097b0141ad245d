//! Which system calls each kind of thread may make: everything else kills the process.
//!
//! One line is one call. Where its arguments matter the line says what they may be; several lines may name the same
//! call. Only the low 32 bits of an argument are looked at, which is all the kernel takes of each argument named here.
//!
//! vCPUs that are added to a running VM are started by the main thread, and a thread keeps its parent's filter beside its
//! own. So the main thread's part has to cover that of vCPUs, and what a thread does to begin.

use super::filter::{Check, Rule};

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs a vCPU: `KVM_RUN`, and registers of devices.
    Vcpu,
    /// Control socket and queues of all devices but the file server.
    Main,
    /// The file server.
    Files,
}

impl Thread {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vcpu, Self::Main, Self::Files];
}

const V: u8 = 1 << Thread::Vcpu as u8;
const M: u8 = 1 << Thread::Main as u8;
const F: u8 = 1 << Thread::Files as u8;

/// ioctls of KVM (linux/kvm.h), of taps (linux/if_tun.h) and of vhost-net (linux/vhost.h), by number.
mod ioctl {
    pub const KVM_RUN: u32 = 0xae80;
    pub const KVM_GET_REGS: u32 = 0x8090_ae81;
    pub const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
    pub const KVM_CREATE_VCPU: u32 = 0xae41;
    pub const KVM_SET_CPUID2: u32 = 0x4008_ae90;
    pub const KVM_SET_MSRS: u32 = 0x4008_ae89;
    pub const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
    pub const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
    pub const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
    pub const KVM_IOEVENTFD: u32 = 0x4040_ae79;
    pub const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
    pub const KVM_GET_SREGS: u32 = 0x8138_ae83;
    pub const KVM_GET_XSAVE: u32 = 0x9000_aea4;
    pub const KVM_GET_XCRS: u32 = 0x8188_aea6;
    pub const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
    pub const KVM_GET_MSRS: u32 = 0xc008_ae88;
    pub const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
    pub const KVM_GET_TSC_KHZ: u32 = 0xaea3;
    pub const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
    pub const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
    pub const TUNSETOFFLOAD: u32 = 0x4004_54d0;
    pub const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
    pub const TUNSETQUEUE: u32 = 0x4004_54d9;
    pub const VHOST_GET_FEATURES: u32 = 0x8008_af00;
    pub const VHOST_SET_FEATURES: u32 = 0x4008_af00;
    pub const VHOST_SET_OWNER: u32 = 0xaf01;
    pub const VHOST_SET_MEM_TABLE: u32 = 0x4008_af03;
    pub const VHOST_SET_VRING_NUM: u32 = 0x4008_af10;
    pub const VHOST_SET_VRING_ADDR: u32 = 0x4028_af11;
    pub const VHOST_SET_VRING_BASE: u32 = 0x4008_af12;
    pub const VHOST_GET_VRING_BASE: u32 = 0xc008_af12;
    pub const VHOST_SET_VRING_KICK: u32 = 0x4008_af20;
    pub const VHOST_SET_VRING_CALL: u32 = 0x4008_af21;
    pub const VHOST_SET_VRING_ERR: u32 = 0x4008_af22;
    pub const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;
}

/// What pthread_create(3) of the GNU C library asks clone(2) for.
const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

const fn rule(name: &'static str, number: libc::c_long, threads: u8) -> Rule {
    Rule {
        name,
        number: number as u32,
        threads,
        check: Check::Any,
    }
}

const fn checked(name: &'static str, number: libc::c_long, threads: u8, check: Check) -> Rule {
    Rule {
        name,
        number: number as u32,
        threads,
        check,
    }
}

/// Pages that are writable and executable are what an attacker wants next.
const NO_CODE: Check = Check::NoBits(2, libc::PROT_EXEC as u32);

/// The table. The most frequent come first: a filter is read from the start.
#[rustfmt::skip]
pub const RULES: &[Rule] = &[
    // The guest, and queues.
    checked("ioctl", libc::SYS_ioctl, V | M, Check::OneOf(1, &[
        ioctl::KVM_RUN,
        // The guest's clock after a pause; where it was when KVM gave up.
        ioctl::KVM_KVMCLOCK_CTRL,
        ioctl::KVM_GET_REGS,
        // A driver chooses its offloads.
        ioctl::TUNSETOFFLOAD,
        ioctl::TUNSETVNETHDRSZ,
        // It turns pairs of queues on, and a reset turns them off.
        ioctl::TUNSETQUEUE,
    ])),
    rule("read", libc::SYS_read, V | M | F),
    rule("write", libc::SYS_write, V | M | F),
    rule("futex", libc::SYS_futex, V | M | F),
    rule("epoll_wait", libc::SYS_epoll_wait, M | F),
    rule("readv", libc::SYS_readv, M | F),
    rule("writev", libc::SYS_writev, M | F),

    // Memory of this process.
    rule("madvise", libc::SYS_madvise, V | M | F),
    checked("mmap", libc::SYS_mmap, V | M | F, NO_CODE),
    rule("munmap", libc::SYS_munmap, V | M | F),
    checked("mprotect", libc::SYS_mprotect, V | M | F, NO_CODE),
    rule("mremap", libc::SYS_mremap, V | M | F),
    rule("brk", libc::SYS_brk, V | M | F),

    // Descriptors. A device that is reset closes its streams.
    rule("close", libc::SYS_close, V | M | F),
    checked("fcntl", libc::SYS_fcntl, V | M | F, Check::OneOf(1, &[
        libc::F_GETFD as u32,
        libc::F_GETFL as u32,
        libc::F_SETFL as u32,
        libc::F_DUPFD_CLOEXEC as u32,
    ])),
    rule("dup", libc::SYS_dup, V | M | F),
    rule("eventfd2", libc::SYS_eventfd2, V | M | F),
    rule("epoll_create1", libc::SYS_epoll_create1, V | M | F),
    rule("epoll_ctl", libc::SYS_epoll_ctl, V | M | F),
    rule("shutdown", libc::SYS_shutdown, V | M),
    // Deadlines of connections.
    rule("timerfd_settime", libc::SYS_timerfd_settime, V | M),

    // The end of a thread or of the process; signals that interrupt KVM_RUN.
    rule("rt_sigreturn", libc::SYS_rt_sigreturn, V | M | F),
    rule("rt_sigprocmask", libc::SYS_rt_sigprocmask, V | M | F),
    // abort(3), after a panic.
    rule("rt_sigaction", libc::SYS_rt_sigaction, V | M | F),
    rule("restart_syscall", libc::SYS_restart_syscall, V | M | F),
    rule("sigaltstack", libc::SYS_sigaltstack, V | M | F),
    checked("tgkill", libc::SYS_tgkill, V | M | F, Check::Own(0)),
    rule("getpid", libc::SYS_getpid, V | M | F),
    rule("gettid", libc::SYS_gettid, V | M | F),
    rule("exit", libc::SYS_exit, V | M | F),
    rule("exit_group", libc::SYS_exit_group, V | M | F),

    // What the C library and Rust's fall back on.
    rule("clock_gettime", libc::SYS_clock_gettime, V | M | F),
    rule("sched_yield", libc::SYS_sched_yield, V | M | F),
    rule("getrandom", libc::SYS_getrandom, M | F),

    // The control socket. No thread makes a socket of its own, of any family.
    rule("recvmsg", libc::SYS_recvmsg, M),
    rule("sendmsg", libc::SYS_sendmsg, M),

    // Disks, and descriptors that came with a request.
    rule("preadv", libc::SYS_preadv, M),
    rule("pwritev", libc::SYS_pwritev, M),
    rule("pread64", libc::SYS_pread64, M | F),
    rule("pwrite64", libc::SYS_pwrite64, M | F),
    rule("fdatasync", libc::SYS_fdatasync, M | F),
    rule("fsync", libc::SYS_fsync, M | F),
    rule("fallocate", libc::SYS_fallocate, M | F),
    rule("lseek", libc::SYS_lseek, M | F),
    rule("statx", libc::SYS_statx, M | F),
    rule("fstat", libc::SYS_fstat, M | F),
    // With a path it needs a root directory with something in it.
    rule("newfstatat", libc::SYS_newfstatat, M | F),

    // A driver starts and resets a network device whose rings the kernel serves.
    checked("ioctl", libc::SYS_ioctl, V | M, Check::OneOf(1, &[
        ioctl::VHOST_SET_FEATURES,
        ioctl::VHOST_SET_MEM_TABLE,
        ioctl::VHOST_SET_VRING_NUM,
        ioctl::VHOST_SET_VRING_ADDR,
        ioctl::VHOST_SET_VRING_BASE,
        ioctl::VHOST_SET_VRING_KICK,
        ioctl::VHOST_SET_VRING_CALL,
        ioctl::VHOST_SET_VRING_ERR,
        ioctl::VHOST_NET_SET_BACKEND,
    ])),
    // Such a device comes, and pauses.
    checked("ioctl", libc::SYS_ioctl, M, Check::OneOf(1, &[
        ioctl::VHOST_GET_FEATURES,
        ioctl::VHOST_SET_OWNER,
        ioctl::VHOST_GET_VRING_BASE,
    ])),
    // vCPUs and memory that are added; kicks of queues that turn out to be busy.
    checked("ioctl", libc::SYS_ioctl, M, Check::OneOf(1, &[
        ioctl::KVM_CREATE_VCPU,
        ioctl::KVM_SET_CPUID2,
        ioctl::KVM_SET_MSRS,
        ioctl::KVM_GET_LAPIC,
        ioctl::KVM_SET_LAPIC,
        ioctl::KVM_SET_USER_MEMORY_REGION,
        ioctl::KVM_IOEVENTFD,
    ])),
    // Snapshots.
    checked("ioctl", libc::SYS_ioctl, M, Check::OneOf(1, &[
        ioctl::KVM_GET_MP_STATE,
        ioctl::KVM_GET_SREGS,
        ioctl::KVM_GET_XSAVE,
        ioctl::KVM_GET_XCRS,
        ioctl::KVM_GET_DEBUGREGS,
        ioctl::KVM_GET_MSRS,
        ioctl::KVM_GET_VCPU_EVENTS,
        ioctl::KVM_GET_TSC_KHZ,
        ioctl::KVM_GET_IRQCHIP,
        ioctl::KVM_GET_CLOCK,
    ])),
    checked("clone", libc::SYS_clone, M, Check::OneOf(0, &[THREAD_FLAGS])),
    // Its flags are in memory, where a filter does not see them. The C library goes on with clone(2).
    checked("clone3", libc::SYS_clone3, M, Check::Refuse(libc::ENOSYS as u16)),
    rule("set_robust_list", libc::SYS_set_robust_list, M),
    rule("rseq", libc::SYS_rseq, M),
    rule("sched_getaffinity", libc::SYS_sched_getaffinity, M),
    checked("prctl", libc::SYS_prctl, M, Check::OneOf(0, &[libc::PR_SET_NAME as u32])),
    // A further filter only takes away.
    checked("seccomp", libc::SYS_seccomp, M, Check::OneOf(0, &[libc::SECCOMP_SET_MODE_FILTER])),

    // Files of the shared tree, which is all of the file system there is.
    rule("openat", libc::SYS_openat, F),
    rule("openat2", libc::SYS_openat2, F),
    rule("getdents64", libc::SYS_getdents64, F),
    rule("preadv2", libc::SYS_preadv2, F),
    rule("pwritev2", libc::SYS_pwritev2, F),
    rule("copy_file_range", libc::SYS_copy_file_range, F),
    rule("ftruncate", libc::SYS_ftruncate, F),
    rule("fstatfs", libc::SYS_fstatfs, F),
    rule("syncfs", libc::SYS_syncfs, F),
    rule("flock", libc::SYS_flock, F),
    rule("mkdirat", libc::SYS_mkdirat, F),
    rule("mknodat", libc::SYS_mknodat, F),
    rule("linkat", libc::SYS_linkat, F),
    rule("symlinkat", libc::SYS_symlinkat, F),
    rule("readlinkat", libc::SYS_readlinkat, F),
    rule("unlinkat", libc::SYS_unlinkat, F),
    rule("renameat2", libc::SYS_renameat2, F),
    rule("fchmod", libc::SYS_fchmod, F),
    rule("fchmodat", libc::SYS_fchmodat, F),
    rule("fchownat", libc::SYS_fchownat, F),
    rule("utimensat", libc::SYS_utimensat, F),
    rule("fchdir", libc::SYS_fchdir, F),
    rule("umask", libc::SYS_umask, F),
    rule("getxattr", libc::SYS_getxattr, F),
    rule("setxattr", libc::SYS_setxattr, F),
    rule("listxattr", libc::SYS_listxattr, F),
    rule("removexattr", libc::SYS_removexattr, F),
    rule("fgetxattr", libc::SYS_fgetxattr, F),
    rule("fsetxattr", libc::SYS_fsetxattr, F),
    rule("flistxattr", libc::SYS_flistxattr, F),
    rule("fremovexattr", libc::SYS_fremovexattr, F),
    // When the guest's files are written down the library compares their handles, and where there are none the numbers of
    // inodes. It has these files open, so no number comes twice: handles tell it nothing more.
    checked("name_to_handle_at", libc::SYS_name_to_handle_at, F, Check::Refuse(libc::EOPNOTSUPP as u16)),

    // It acts as the owner the guest names.
    rule("geteuid", libc::SYS_geteuid, F),
    rule("getegid", libc::SYS_getegid, F),
    rule("setresuid", libc::SYS_setresuid, F),
    rule("setresgid", libc::SYS_setresgid, F),
    rule("setgroups", libc::SYS_setgroups, F),
    rule("capget", libc::SYS_capget, F),
    rule("capset", libc::SYS_capset, F),
    // libcap-ng looks for the last capability.
    checked("prctl", libc::SYS_prctl, F, Check::OneOf(0, &[
        libc::PR_CAPBSET_READ as u32,
        libc::PR_GET_SECUREBITS as u32,
        libc::PR_CAP_AMBIENT as u32,
    ])),
];

impl Rule {
    /// Whether it is one of `thread`'s.
    pub fn is_for(&self, thread: Thread) -> bool {
        self.threads & (1 << thread as u8) != 0
    }
}
