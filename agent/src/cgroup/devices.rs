//! Which devices a container may use: cgroup v2 asks a BPF program at every open and mknod.
//!
//! The program is a list of rules, the last one that matches decides, as in the OCI specification. It is written
//! here instruction by instruction; the kernel calls it with `struct bpf_cgroup_dev_ctx`:
//! access type (low 16 bits: 1 block, 2 character; high 16 bits: 1 mknod, 2 read, 4 write), major, minor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

const BLOCK: u32 = 1;
const CHAR: u32 = 2;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// A rule: what it matches, and the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// The rules of a container, first to last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRules(Vec<Rule>);

/// Character devices every container has (the OCI specification's default devices), and terminals.
const DEFAULT_DEVICES: [(u32, Option<u32>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(1)), // console
    (5, Some(2)), // ptmx
    (136, None),  // pts
];

impl DeviceRules {
    /// The rules of a specification, with its own device nodes and the default devices always allowed; nothing if
    /// all is allowed.
    ///
    /// # Errors
    /// A device number or access that does not exist.
    pub fn new(spec: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) -> Result<Option<Self>, CgroupError> {
        let mut rules = Vec::new();
        for entry in spec {
            let rule = rule(entry)?;
            if rule.is_everything() {
                // Everything before it is moot.
                rules.clear();
            }
            rules.push(rule);
        }
        // Without a rule, nothing is asked of the kernel; a list that starts by allowing all and denies nothing
        // needs no program either.
        if rules.iter().all(|rule| rule.allow) && (rules.is_empty() || rules.iter().any(Rule::is_everything))
        {
            return Ok(None);
        }
        for node in nodes {
            rules.push(rule(&LinuxDeviceCgroup::from(node))?);
        }
        for (major, minor) in DEFAULT_DEVICES {
            rules.push(Rule {
                allow: true,
                kind: Some(CHAR),
                major: Some(major),
                minor,
                access: ALL,
            });
        }
        // Making a node is harmless: opening it is what is checked.
        rules.push(Rule {
            allow: true,
            kind: Some(CHAR),
            major: None,
            minor: None,
            access: MKNOD,
        });
        rules.push(Rule {
            allow: true,
            kind: Some(BLOCK),
            major: None,
            minor: None,
            access: MKNOD,
        });
        Ok(Some(Self(rules)))
    }

    /// The verdict on an access, for tests of the program.
    #[cfg(test)]
    fn allows(&self, kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let decisive = self.0.iter().rev().find(|rule| {
            rule.kind.is_none_or(|k| k == kind)
                && rule.major.is_none_or(|m| m == major)
                && rule.minor.is_none_or(|m| m == minor)
                && if rule.allow {
                    access & !rule.access == 0
                } else {
                    access & rule.access != 0
                }
        });
        decisive.is_some_and(|rule| rule.allow)
    }
}

impl Rule {
    fn is_everything(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

fn rule(entry: &LinuxDeviceCgroup) -> Result<Rule, CgroupError> {
    let invalid = |field, value: String| CgroupError::Invalid { field, value };
    let number = |field, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| invalid(field, value.to_string())),
    };
    let kind = match entry.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        Some(LinuxDeviceType::P) => return Err(invalid("devices.type", "p".into())),
    };
    let mut access = 0;
    for letter in entry.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err(invalid("devices.access", letter.to_string())),
        };
    }
    Ok(Rule {
        allow: entry.allow(),
        kind,
        major: number("devices.major", entry.major())?,
        minor: number("devices.minor", entry.minor())?,
        access: if access == 0 { ALL } else { access },
    })
}

/// One BPF instruction (Linux, include/uapi/linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Insn {
    code: u8,
    /// Destination register in the low, source in the high four bits.
    regs: u8,
    off: i16,
    imm: i32,
}

// Opcodes: class | size or operation | source (Linux, include/uapi/linux/bpf_common.h).
const LDX_W: u8 = 0x61;
const MOV32_K: u8 = 0xb4;
const MOV32_X: u8 = 0xbc;
const AND32_K: u8 = 0x54;
const RSH32_K: u8 = 0x74;
const JEQ32_K: u8 = 0x16;
const JNE32_K: u8 = 0x56;
const EXIT: u8 = 0x95;

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn {
        code,
        regs: dst | src << 4,
        off,
        imm,
    }
}

fn verdict(allow: bool) -> [Insn; 2] {
    [insn(MOV32_K, 0, 0, 0, i32::from(allow)), insn(EXIT, 0, 0, 0, 0)]
}

/// r2: kind, r3: access, r4: major, r5: minor; r1 holds the context, then scratch.
fn program(rules: &DeviceRules) -> Vec<Insn> {
    let mut code = vec![
        insn(LDX_W, 2, 1, 0, 0),
        insn(MOV32_X, 3, 2, 0, 0),
        insn(AND32_K, 2, 0, 0, 0xffff),
        insn(RSH32_K, 3, 0, 0, 16),
        insn(LDX_W, 4, 1, 4, 0),
        insn(LDX_W, 5, 1, 8, 0),
    ];
    for rule in rules.0.iter().rev() {
        let mut block = Vec::new();
        for (register, value) in [(2, rule.kind), (4, rule.major), (5, rule.minor)] {
            if let Some(value) = value {
                block.push(insn(JNE32_K, register, 0, 0, value.cast_signed()));
            }
        }
        // An access is allowed only if all of its bits are, denied if one of them is.
        let (bits, skip_if) = if rule.allow {
            (ALL & !rule.access, JNE32_K)
        } else {
            (rule.access, JEQ32_K)
        };
        if bits != if rule.allow { 0 } else { ALL } {
            block.push(insn(MOV32_X, 1, 3, 0, 0));
            block.push(insn(AND32_K, 1, 0, 0, bits.cast_signed()));
            block.push(insn(skip_if, 1, 0, 0, 0));
        }
        if block.is_empty() {
            // The kernel refuses a program with code that cannot be reached.
            code.extend(verdict(rule.allow));
            return code;
        }
        // Jumps go to the first instruction after the block, which has at most eight instructions.
        let length = block.len() + 2;
        for (index, mut instruction) in block.into_iter().enumerate() {
            if matches!(instruction.code, JNE32_K | JEQ32_K) {
                instruction.off = (length - index - 1) as i16;
            }
            code.push(instruction);
        }
        code.extend(verdict(rule.allow));
    }
    code.extend(verdict(false));
    code
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The head of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn load(rules: &DeviceRules) -> Result<OwnedFd, CgroupError> {
    let code = program(rules);
    let license = c"Apache-2.0";
    let load = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).unwrap_or(u32::MAX),
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    let program = bpf(BPF_PROG_LOAD, &load).map_err(CgroupError::Devices)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}

/// Attaches the filter to a group, in place of the one it has. It goes away with the group.
///
/// # Errors
/// The kernel has no `CONFIG_CGROUP_BPF` or refuses the program.
pub fn attach(group: &Path, rules: &DeviceRules) -> Result<(), CgroupError> {
    let program = load(rules)?;
    let group = File::open(group).map_err(CgroupError::Devices)?;
    let attach = AttachAttr {
        target_fd: group.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
    };
    bpf(BPF_PROG_ATTACH, &attach)
        .map_err(CgroupError::Devices)
        .map(drop)
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` and what it points to are valid for reads; the kernel takes missing fields as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    i32::try_from(result)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn rules(json: &str) -> Option<DeviceRules> {
        DeviceRules::new(
            &serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap(),
            &[],
        )
        .unwrap()
    }

    /// Interprets the few instructions the program is made of.
    fn run(code: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut regs = [0u32; 11];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (dst, src) = ((i.regs & 15) as usize, (i.regs >> 4) as usize);
            at += 1;
            match i.code {
                LDX_W => regs[dst] = context[i.off as usize / 4],
                MOV32_X => regs[dst] = regs[src],
                MOV32_K => regs[dst] = i.imm as u32,
                AND32_K => regs[dst] &= i.imm as u32,
                RSH32_K => regs[dst] >>= i.imm,
                JNE32_K if regs[dst] != i.imm as u32 => at += i.off as usize,
                JEQ32_K if regs[dst] == i.imm as u32 => at += i.off as usize,
                JNE32_K | JEQ32_K => (),
                EXIT => return regs[0] != 0,
                code => panic!("opcode {code:#x}"),
            }
        }
    }

    /// Instructions no path leads to, which the kernel's verifier refuses.
    fn unreachable(code: &[Insn]) -> Vec<usize> {
        let mut reached = vec![false; code.len()];
        let mut paths = vec![0];
        while let Some(at) = paths.pop() {
            if !std::mem::replace(&mut reached[at], true) && code[at].code != EXIT {
                paths.push(at + 1);
                if matches!(code[at].code, JEQ32_K | JNE32_K) {
                    paths.push(at + 1 + code[at].off as usize);
                }
            }
        }
        (0..code.len()).filter(|at| !reached[*at]).collect()
    }

    #[test]
    fn containerds_default_denies_all_but_the_default_devices() {
        let rules = rules(r#"[{"allow":false,"access":"rwm"}]"#).unwrap();
        let code = program(&rules);
        assert!(run(&code, CHAR, READ | WRITE, 1, 3));
        assert!(run(&code, CHAR, READ | WRITE, 136, 7));
        assert!(run(&code, BLOCK, MKNOD, 254, 0));
        assert!(!run(&code, BLOCK, READ, 254, 0));
        assert!(!run(&code, CHAR, READ, 10, 229));
    }

    #[test]
    fn a_privileged_container_needs_no_program() {
        assert_eq!(rules(r#"[{"allow":true,"access":"rwm"}]"#), None);
        assert_eq!(rules("[]"), None);
        assert_eq!(rules(r#"[{"allow":false},{"allow":true,"access":"rwm"}]"#), None);
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            r#"[{"allow":true,"access":"x"}]"#,
            r#"[{"allow":true,"major":-5}]"#,
            r#"[{"allow":true,"type":"p"}]"#,
        ] {
            let entries: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
            assert!(DeviceRules::new(&entries, &[]).is_err(), "{json}");
        }
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0u32..4);
        (
            any::<bool>(),
            prop::option::of(1u32..3),
            number(),
            number(),
            1u32..8,
        )
            .prop_map(|(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            })
    }

    proptest! {
        #[test]
        fn program_decides_as_the_rules(
            list in prop::collection::vec(any_rule(), 0..12),
            kind in 1u32..3, access in 1u32..8, major in 0u32..5, minor in 0u32..5,
        ) {
            let rules = DeviceRules(list);
            let verdict = run(&program(&rules), kind, access, major, minor);
            prop_assert_eq!(verdict, rules.allows(kind, access, major, minor));
            prop_assert_eq!(unreachable(&program(&rules)), Vec::<usize>::new());
        }
    }
}
