#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A call as a filter sees it.
#[derive(Clone, Debug)]
struct Call {
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
}

impl Call {
    fn new(number: libc::c_long, arguments: &[u64]) -> Self {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        Self {
            architecture: X86_64,
            number: number as u32,
            arguments: all,
        }
    }

    fn word(&self, offset: u32) -> u32 {
        match offset {
            NUMBER => self.number,
            ARCHITECTURE => self.architecture,
            offset => {
                let place = offset.checked_sub(ARGUMENTS).unwrap();
                assert_eq!(place % 8, 0, "low halves of arguments only");
                self.arguments[place as usize / 8] as u32
            }
        }
    }

    /// What the table says.
    fn expected(&self, thread: Thread) -> u32 {
        if self.architecture != X86_64 {
            return libc::SECCOMP_RET_KILL_PROCESS;
        }
        for rule in RULES
            .iter()
            .filter(|rule| rule.is_for(thread) && rule.number == self.number)
        {
            let argument = |place: u8| self.arguments[usize::from(place)] as u32;
            let fits = match rule.check {
                Check::Any => true,
                Check::OneOf(place, values) => values.contains(&argument(place)),
                Check::NoBits(place, bits) => argument(place) & bits == 0,
                Check::Own(place) => argument(place) == std::process::id(),
                Check::Refuse(errno) => return libc::SECCOMP_RET_ERRNO | u32::from(errno),
            };
            if fits {
                return libc::SECCOMP_RET_ALLOW;
            }
        }
        libc::SECCOMP_RET_KILL_PROCESS
    }
}

/// Runs a program as the kernel does.
fn run(program: &[libc::sock_filter], call: &Call) -> u32 {
    execute(program, call).0
}

/// The answer, and how many instructions it took.
fn execute(program: &[libc::sock_filter], call: &Call) -> (u32, usize) {
    let mut at = 0;
    let mut value = 0;
    let mut steps = 0;
    loop {
        steps += 1;
        let instruction = program[at];
        at += 1;
        let k = instruction.k;
        let mut jump = |taken: bool| at += usize::from(if taken { instruction.jt } else { instruction.jf });
        match u32::from(instruction.code) {
            0x20 => value = call.word(k),
            0x15 => jump(value == k),
            0x35 => jump(value >= k),
            0x45 => jump(value & k != 0),
            0x05 => at += k as usize,
            0x06 => return (k, steps),
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

fn answer_to(thread: Thread, number: libc::c_long, arguments: &[u64]) -> u32 {
    run(&program(thread), &Call::new(number, arguments))
}

/// Calls that it may make, with some arguments or any.
fn calls(thread: Thread) -> BTreeSet<u32> {
    let allowed = |rule: &&Rule| rule.is_for(thread) && !matches!(rule.check, Check::Refuse(_));
    let rules = RULES.iter().filter(allowed);
    rules.map(|rule| rule.number).collect()
}

/// Numbers and arguments that the table names, and any others.
fn any_call() -> impl Strategy<Value = Call> {
    let values: Vec<u64> = RULES
        .iter()
        .flat_map(|rule| match rule.check {
            Check::OneOf(_, values) => values.to_vec(),
            Check::NoBits(_, bits) => vec![bits],
            _ => Vec::new(),
        })
        .map(u64::from)
        .collect();
    let argument = prop_oneof![proptest::sample::select(values), 0..16u64, any::<u64>()];
    let architecture = prop_oneof![9 => Just(X86_64), 1 => any::<u32>()];
    let number = prop_oneof![0..500u32, any::<u32>()];
    (architecture, number, proptest::array::uniform6(argument)).prop_map(
        |(architecture, number, arguments)| Call {
            architecture,
            number,
            arguments,
        },
    )
}

proptest! {
    #[test]
    fn filters_do_what_the_table_says(call in any_call()) {
        for thread in Thread::ALL {
            prop_assert_eq!(run(&program(thread), &call), call.expected(thread), "{:?}", thread);
        }
    }

    #[test]
    fn the_high_half_of_an_argument_opens_nothing(high in 1..=u32::MAX) {
        // The kernel ignores it as well.
        let high = u64::from(high) << 32;
        prop_assert_eq!(
            answer_to(Thread::Main, libc::SYS_clone, &[high | libc::CLONE_NEWUSER as u64]),
            libc::SECCOMP_RET_KILL_PROCESS
        );
    }
}

#[test]
fn a_number_is_found_in_few_steps() {
    for thread in Thread::ALL {
        let program = program(thread);
        let numbers: BTreeSet<u32> = RULES
            .iter()
            .filter(|rule| rule.is_for(thread))
            .map(|rule| rule.number)
            .collect();
        let unknown = (0..500).filter(|number| !numbers.contains(number));
        let most = unknown.map(|number| execute(&program, &Call::new(number.into(), &[])).1);
        // The architecture and the number take three instructions, each halving two, the few that are left one each.
        let halvings = numbers.len().next_power_of_two().ilog2() as usize;
        assert!(most.max().unwrap() <= 3 + 2 * halvings + FEW + 1, "{thread:?}");
    }
}

#[test]
fn every_line_of_the_table_works() {
    for rule in RULES {
        let (place, value, expected) = match rule.check {
            Check::Any => (0, 0, libc::SECCOMP_RET_ALLOW),
            Check::OneOf(place, values) => (place, values[values.len() - 1], libc::SECCOMP_RET_ALLOW),
            Check::NoBits(place, bits) => (place, !bits, libc::SECCOMP_RET_ALLOW),
            Check::Own(place) => (place, std::process::id(), libc::SECCOMP_RET_ALLOW),
            Check::Refuse(errno) => (0, 0, libc::SECCOMP_RET_ERRNO | u32::from(errno)),
        };
        let mut call = Call::new(rule.number.into(), &[]);
        call.arguments[usize::from(place)] = value.into();
        for thread in Thread::ALL.into_iter().filter(|thread| rule.is_for(*thread)) {
            assert_eq!(
                run(&program(thread), &call),
                expected,
                "{} of {thread:?}",
                rule.name
            );
        }
    }
}

#[test]
fn vcpus_get_few_calls() {
    assert!(calls(Thread::Vcpu).len() <= 30, "{}", calls(Thread::Vcpu).len());
    for thread in Thread::ALL {
        assert!(
            program(thread).len() < 256,
            "{thread:?}: {}",
            program(thread).len()
        );
    }
}

#[test]
fn an_added_vcpu_can_live_with_the_main_threads_filter() {
    for rule in RULES.iter().filter(|rule| rule.is_for(Thread::Vcpu)) {
        assert!(rule.is_for(Thread::Main), "{}", rule.name);
    }
}

#[test]
fn no_thread_gets_what_leads_out() {
    let forbidden = [
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_accept4,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_memfd_create,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_open,
    ];
    for thread in Thread::ALL {
        for number in forbidden {
            assert!(
                !calls(thread).contains(&(number as u32)),
                "{thread:?} may call {number}"
            );
        }
    }
}

#[test]
fn arguments_are_checked() {
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    let unsupported = libc::SECCOMP_RET_ERRNO | libc::EOPNOTSUPP as u32;
    let readable = libc::PROT_READ as u64;
    let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    for (thread, number, arguments, expected) in [
        // KVM_RUN, and KVM_CREATE_VM.
        (Thread::Vcpu, libc::SYS_ioctl, &[9, 0xae80, 0][..], ALLOW),
        (Thread::Vcpu, libc::SYS_ioctl, &[9, 0xae01, 0], KILL),
        // KVM_CREATE_VCPU, for the second of the two lines.
        (Thread::Vcpu, libc::SYS_ioctl, &[9, 0xae41, 0], KILL),
        (Thread::Main, libc::SYS_ioctl, &[9, 0xae41, 0], ALLOW),
        (Thread::Main, libc::SYS_ioctl, &[9, 0xae80, 0], ALLOW),
        // KVM_IOEVENTFD.
        (Thread::Vcpu, libc::SYS_ioctl, &[9, 0x4040_ae79, 0], KILL),
        (Thread::Main, libc::SYS_ioctl, &[9, 0x4040_ae79, 0], ALLOW),
        // TUNSETQUEUE.
        (Thread::Vcpu, libc::SYS_ioctl, &[9, 0x4004_54d9, 0], ALLOW),
        (Thread::Main, libc::SYS_ioctl, &[9, 0x4004_54d9, 0], ALLOW),
        (Thread::Files, libc::SYS_ioctl, &[9, 0x4004_54d9, 0], KILL),
        // TUNSETIFF, TIOCSTI; the file server has none.
        (Thread::Main, libc::SYS_ioctl, &[9, 0x4004_54ca, 0], KILL),
        (Thread::Main, libc::SYS_ioctl, &[0, 0x5412, 0], KILL),
        (Thread::Files, libc::SYS_ioctl, &[9, 0xae80, 0], KILL),
        (Thread::Vcpu, libc::SYS_mmap, &[0, 4096, readable], ALLOW),
        (Thread::Vcpu, libc::SYS_mmap, &[0, 4096, code], KILL),
        (Thread::Files, libc::SYS_mprotect, &[0, 4096, code], KILL),
        (Thread::Main, libc::SYS_clone3, &[0, 0], enosys),
        (Thread::Vcpu, libc::SYS_clone3, &[0, 0], KILL),
        (Thread::Files, libc::SYS_name_to_handle_at, &[0, 0], unsupported),
        (Thread::Main, libc::SYS_name_to_handle_at, &[0, 0], KILL),
        (Thread::Main, libc::SYS_clone, &[libc::SIGCHLD as u64], KILL),
        (
            Thread::Main,
            libc::SYS_prctl,
            &[libc::PR_SET_DUMPABLE as u64, 1],
            KILL,
        ),
        (
            Thread::Files,
            libc::SYS_prctl,
            &[libc::PR_CAPBSET_READ as u64, 3],
            ALLOW,
        ),
    ] {
        assert_eq!(
            answer_to(thread, number, arguments),
            expected,
            "{thread:?} {number} {arguments:?}"
        );
    }
}

#[test]
fn a_network_device_on_the_kernels_server_can_start_stop_and_pause() {
    // linux/vhost.h: what a driver's start and reset take, then what is done with nothing but requests.
    let of_drivers = [
        0x4008_af00,
        0x4008_af03,
        0x4008_af10,
        0x4028_af11,
        0x4008_af12,
        0x4008_af20,
        0x4008_af21,
        0x4008_af22,
        0x4008_af30,
    ];
    let of_requests = [0x8008_af00, 0xaf01, 0xc008_af12];
    let answer = |thread, number| answer_to(thread, libc::SYS_ioctl, &[9, number, 0]);
    for number in of_drivers {
        for thread in [Thread::Vcpu, Thread::Main] {
            assert_eq!(
                answer(thread, number),
                libc::SECCOMP_RET_ALLOW,
                "{thread:?} {number:#x}"
            );
        }
    }
    for number in of_requests {
        assert_eq!(
            answer(Thread::Main, number),
            libc::SECCOMP_RET_ALLOW,
            "{number:#x}"
        );
        assert_eq!(
            answer(Thread::Vcpu, number),
            libc::SECCOMP_RET_KILL_PROCESS,
            "{number:#x}"
        );
    }
    // VHOST_SET_LOG_BASE, VHOST_SET_BACKEND_FEATURES.
    for number in [0x4008_af04, 0x4008_af25] {
        assert_eq!(
            answer(Thread::Main, number),
            libc::SECCOMP_RET_KILL_PROCESS,
            "{number:#x}"
        );
    }
}
