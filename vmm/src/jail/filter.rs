//! Makes seccomp filters (seccomp(2)) of the [table](super::table).
//!
//! A filter is a program for the kernel's classic BPF machine (Linux Documentation/networking/filter.rst). It reads a
//! `struct seccomp_data`: the call's number at 0, the architecture at 4, and six arguments of 64 bits from 16 on.

use std::collections::BTreeMap;
use std::io;

use super::table::{RULES, Thread};

#[cfg(test)]
mod tests;

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Its name in the manual.
    pub name: &'static str,
    /// Its number on x86-64.
    pub number: u32,
    /// For which threads: a bit for each [`Thread`].
    pub threads: u8,
    /// What its arguments may be.
    pub check: Check,
}

/// What the arguments of a call may be.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// Anything.
    Any,
    /// The argument of this place has one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument of this place has none of these bits set.
    NoBits(u8, u32),
    /// The argument of this place is the process's own id.
    Own(u8),
    /// The call fails with this errno, and nothing happens.
    Refuse(u16),
}

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

const fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// Skips `jt` instructions if the value loaded is `k`, else `jf`.
const fn equal(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k)
}

/// Skips `jt` instructions if the value loaded is `k` or more, else `jf`.
const fn at_least(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, jt, jf, k)
}

/// Skips `jt` instructions if the value loaded has a bit of `k`, else `jf`.
const fn any_bit(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, jt, jf, k)
}

const fn answer(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

/// So many numbers are compared one by one: the shorter the program, the sooner the kernel has translated it.
const FEW: usize = 8;

const ALLOW: libc::sock_filter = answer(libc::SECCOMP_RET_ALLOW);
const KILL: libc::sock_filter = answer(libc::SECCOMP_RET_KILL_PROCESS);

/// The filter of a thread.
pub fn program(thread: Thread) -> Vec<libc::sock_filter> {
    compile(RULES.iter().filter(|rule| rule.is_for(thread)))
}

/// The program that allows what `rules` do and kills the process for everything else, calls by another architecture's
/// numbers among it. x86-64's 32-bit interface has numbers of its own, which are in no table.
///
/// Numbers are searched by halves. It is not for the calls alone: the kernel runs a new filter once for each number there
/// is, to know those that need no filter (`seccomp_cache_prepare`), and a VM waits for that as often as it has threads.
fn compile<'a>(rules: impl Iterator<Item = &'a Rule>) -> Vec<libc::sock_filter> {
    let mut calls = BTreeMap::<u32, Vec<libc::sock_filter>>::new();
    for rule in rules {
        calls.entry(rule.number).or_default().extend(body(rule.check));
    }
    let calls: Vec<_> = calls.into_iter().collect();
    let mut program = vec![load(ARCHITECTURE), equal(X86_64, 1, 0), KILL, load(NUMBER)];
    program.extend(search(&calls));
    program
}

/// Goes to the part that belongs to the number. It ends the program.
fn search(calls: &[(u32, Vec<libc::sock_filter>)]) -> Vec<libc::sock_filter> {
    if let Some(few) = compare(calls) {
        return few;
    }
    let (low, high) = calls.split_at(calls.len() / 2);
    let first = high[0].0;
    let (low, high) = (search(low), search(high));
    // Only a jump that has no condition goes further than 255 instructions.
    let over = instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, low.len() as u32);
    let mut program = vec![at_least(first, 0, 1), over];
    program.extend(low);
    program.extend(high);
    program
}

/// Compares the number with a few, one after the other; `None`: there are too many, or jumps would be too far.
fn compare(calls: &[(u32, Vec<libc::sock_filter>)]) -> Option<Vec<libc::sock_filter>> {
    if calls.len() > FEW {
        return None;
    }
    let free = |body: &[libc::sock_filter]| body.len() == 1 && body[0].k == libc::SECCOMP_RET_ALLOW;
    let length: usize = calls
        .iter()
        .map(|(_, body)| if free(body) { 1 } else { 1 + body.len() })
        .sum();
    if length > usize::from(u8::MAX) && calls.len() > 1 {
        return None;
    }
    let mut program = Vec::with_capacity(length + 2);
    for (number, body) in calls {
        if free(body) {
            // Over the rest and the end, to the answer that they share.
            let far = length - program.len();
            program.push(equal(*number, far as u8, 0));
        } else {
            program.push(equal(*number, 0, body.len() as u8));
            program.extend(body);
        }
    }
    program.extend([KILL, ALLOW]);
    Some(program)
}

/// What follows when the number is the rule's. It ends the program or leaves the number loaded.
fn body(check: Check) -> Vec<libc::sock_filter> {
    let argument = |place: u8| load(ARGUMENTS + 8 * u32::from(place));
    let one_of = |place, values: &[u32]| {
        let mut body = vec![argument(place)];
        for (index, value) in values.iter().enumerate() {
            // To the end of the comparisons, over the jump that skips it.
            body.push(equal(*value, (values.len() - index) as u8, 0));
        }
        body.extend([
            instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, 1),
            ALLOW,
            load(NUMBER),
        ]);
        body
    };
    match check {
        Check::Any => vec![ALLOW],
        Check::Refuse(errno) => vec![answer(libc::SECCOMP_RET_ERRNO | u32::from(errno))],
        Check::NoBits(place, bits) => vec![argument(place), any_bit(bits, 1, 0), ALLOW, load(NUMBER)],
        Check::OneOf(place, values) => one_of(place, values),
        Check::Own(place) => one_of(place, &[std::process::id()]),
    }
}

/// Confines the calling thread, and threads it starts, for good. It must have `no_new_privs`.
///
/// # Errors
/// The kernel knows no seccomp filters, or has no memory.
pub fn install(thread: Thread) -> io::Result<()> {
    let mut program = program(thread);
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog {
        len: length,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the filter and its program live during the call, which copies them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
