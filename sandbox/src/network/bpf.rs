//! A program in the kernel that hands every connection to the namespace's loopback address to one socket.
//!
//! Programs of type `SK_LOOKUP` choose the listening socket of an incoming connection before the kernel looks for
//! one itself (linux/Documentation/bpf/prog_sk_lookup.rst). The instructions are written out below: a compiler and
//! a loader for so few would be the larger risk.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

/// `BPF_MAP_TYPE_SOCKMAP`, `BPF_PROG_TYPE_SK_LOOKUP`, `BPF_SK_LOOKUP` (linux/bpf.h).
const SOCKMAP: u32 = 15;
const SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Helper functions (linux/bpf.h).
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup` (linux/bpf.h).
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Opcodes (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x62;
const LOAD_64: u8 = 0x18;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// Source register of [`LOAD_64`] whose value is a map's descriptor.
const MAP_FD: u8 = 1;
/// `SK_PASS`: the chosen socket, or else the usual search.
const PASS: i32 = 1;

/// One instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

const fn op(code: u8, destination: u8, source: u8, offset: i16, value: i32) -> Instruction {
    Instruction {
        code,
        registers: destination | source << 4,
        offset,
        value,
    }
}

/// The program. Register 6 keeps the context, 7 the socket; what is not meant jumps to the end and passes.
fn program(map: i32) -> [Instruction; 34] {
    const IPV4: i16 = 15;
    const ASSIGN: i16 = 18;
    const END: i16 = 32;
    let end_unless = |at: i16, register: u8, value: i32| op(JUMP_NOT_EQUAL, register, 0, END - at - 1, value);
    [
        op(MOVE_REGISTER, 6, 1, 0, 0),
        op(LOAD_WORD, 2, 6, PROTOCOL, 0),
        end_unless(2, 2, libc::IPPROTO_TCP),
        op(LOAD_WORD, 2, 6, FAMILY, 0),
        op(JUMP_EQUAL, 2, 0, IPV4 - 5, libc::AF_INET),
        end_unless(5, 2, libc::AF_INET6),
        // ::1
        op(LOAD_WORD, 2, 6, LOCAL_IP6, 0),
        end_unless(7, 2, 0),
        op(LOAD_WORD, 2, 6, LOCAL_IP6 + 4, 0),
        end_unless(9, 2, 0),
        op(LOAD_WORD, 2, 6, LOCAL_IP6 + 8, 0),
        end_unless(11, 2, 0),
        op(LOAD_WORD, 2, 6, LOCAL_IP6 + 12, 0),
        end_unless(13, 2, 1i32.to_be()),
        op(JUMP, 0, 0, ASSIGN - 15, 0),
        // 127.0.0.0/8: the first byte in memory
        op(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        op(AND, 2, 0, 0, 0xff),
        end_unless(17, 2, 127),
        // The only socket of the map
        op(STORE_WORD, 10, 0, -4, 0),
        op(MOVE_REGISTER, 2, 10, 0, 0),
        op(ADD, 2, 0, 0, -4),
        op(LOAD_64, 1, MAP_FD, 0, map),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        op(JUMP_EQUAL, 0, 0, END - 25, 0),
        op(MOVE_REGISTER, 7, 0, 0, 0),
        op(MOVE_REGISTER, 1, 6, 0, 0),
        op(MOVE_REGISTER, 2, 7, 0, 0),
        op(MOVE, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(MOVE_REGISTER, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
        op(MOVE, 0, 0, 0, PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// `union bpf_attr` as each command uses it (linux/bpf.h); what follows is zero.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A steering that is in force; it ends when the last copy of the descriptor is closed.
#[derive(Debug)]
pub(super) struct Steering {
    _link: OwnedFd,
}

/// Hands every TCP connection to 127.0.0.0/8 and ::1 in `namespace` to `listener`, a listening TCP socket of that
/// namespace. Connections to other addresses go their usual way.
///
/// # Errors
/// The kernel has no bpf(2), or the process may not use it.
pub(super) fn steer_loopback(namespace: impl AsFd, listener: impl AsFd) -> io::Result<Steering> {
    let map = descriptor(
        MAP_CREATE,
        &MapCreate {
            kind: SOCKMAP,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
        },
    )?;
    let (key, value) = (0u32, u64::from(raw(&listener)));
    call(
        MAP_UPDATE_ELEM,
        &MapUpdate {
            map: raw(&map),
            _pad: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        },
    )?;
    let instructions = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"bulkhead");
    let program = descriptor(
        PROG_LOAD,
        &ProgLoad {
            kind: SK_LOOKUP,
            count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
            instructions: address(instructions.as_ptr()),
            license: address(license.as_ptr()),
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            attach_type: ATTACH_SK_LOOKUP,
        },
    )?;
    let link = descriptor(
        LINK_CREATE,
        &LinkCreate {
            program: raw(&program),
            target: raw(&namespace),
            attach_type: ATTACH_SK_LOOKUP,
            flags: 0,
        },
    )?;
    Ok(Steering { _link: link })
}

fn raw(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().unsigned_abs()
}

fn address<T>(pointer: *const T) -> u64 {
    pointer as u64
}

fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are a plain struct of the size given, and what they point to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes).cast::<c_void>(),
            size_of::<T>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|result| *result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// A command that answers with a descriptor, which the kernel closes on exec.
fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
