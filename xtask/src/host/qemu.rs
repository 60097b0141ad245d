//! Avoids two faults of QEMU's emulation of AMD's SVM that stop guests of the emulated host, or the host itself.
//!
//! **An interrupt is delivered twice.** `VMRUN` with an external interrupt to inject (APM volume 2, section 15.20) delivers the
//! interrupt at once, and also leaves its vector where QEMU keeps an exception that is still to be delivered. If the processor's
//! thread is asked to stop before anything else overwrites that (a timer, the end of an instruction budget, a request of another
//! processor), the vector is delivered a second time, whatever the guest's interrupt flag says. A guest kernel then
//! waits for ever for a lock it holds itself, or ends in a triple fault. Seen in QEMU 7.2 and 10.0, mostly in the
//! deterministic mode (`exception_index` is set in `helper_vmrun`). The store is not needed, so it is replaced by an instruction
//! that does nothing.
//!
//! **An interrupt is lost.** Both `VMRUN` and the way back change the request of a virtual interrupt, one bit of the word
//! `interrupt_request`, by reading and writing the whole word, without the lock under which another thread sets the bit
//! that announces a device's interrupt. About once in a processor-hour that bit is lost in between: the interrupt controller holds
//! the interrupt of the host's timer, and the halted processor never looks. The two instructions are replaced by ones
//! that read and write no more than the byte with their own bit.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Code that Debian's compiler makes and a part of it that is replaced by other code.
struct Repair {
    /// What the code does.
    what: &'static str,
    /// The code as hexadecimal bytes. A dot is any byte: the places in QEMU's state change with its version.
    code: &'static str,
    /// Makes the replacement of the whole code.
    replace: fn(&[u8]) -> Vec<u8>,
}

const REPAIRS: [Repair; 3] = [
    // The case "external interrupt": error code, vector, "not by an instruction", "no next instruction".
    Repair {
        what: "injects interrupts into nested guests",
        code: "44 89 ab . . . .  89 b3 . . . .  c7 83 . . . . 00 00 00 00  48 c7 83 . . . . ff ff ff ff",
        replace: without_vector,
    },
    // orl $0x100, interrupt_request(%rbx), which is 0x8000 bytes at most before the registers that %rbx points to.
    Repair {
        what: "requests virtual interrupts",
        code: "81 8b . . ff ff 00 01 00 00",
        replace: |code| second_byte_only(code, 0x8b, 0x01),
    },
    // andl $~0x100, interrupt_request(%rbx)
    Repair {
        what: "takes back virtual interrupts",
        code: "81 a3 . . ff ff ff fe ff ff",
        replace: |code| second_byte_only(code, 0xa3, 0xfe),
    },
];

/// The stores without that of the vector: `nopw 0(%rax,%rax,1)`, one instruction of the same length.
fn without_vector(code: &[u8]) -> Vec<u8> {
    let nop = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
    [&code[..7], &nop, &code[13..]].concat()
}

/// `orb` or `andb` of the second byte, and `nopl (%rax)`, which together have the length of `code`.
fn second_byte_only(code: &[u8], operation: u8, operand: u8) -> Vec<u8> {
    // The word lies at a multiple of four.
    let place = [code[2] | 1, code[3], code[4], code[5]];
    [&[0x80, operation][..], &place, &[operand, 0x0f, 0x1f, 0x00]].concat()
}

/// Repairs the program at `path`. Where the code is not the known one (another version, which may need another pattern or
/// none), it stays as it is and a warning says what to expect.
///
/// # Errors
/// The program cannot be read or written.
pub fn repair(path: &Path) -> Result<()> {
    let mut program = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    for repair in &REPAIRS {
        if let Err(times) = repair.apply(&mut program) {
            eprintln!(
                "warning: the code of QEMU that {} was found {times} times, not once; it stays as it is, and guests of the \
                 emulated host may stop now and then (xtask/src/host/qemu.rs)",
                repair.what
            );
        }
    }
    fs::write(path, program).with_context(|| format!("cannot write {}", path.display()))
}

impl Repair {
    /// Replaces the code, or tells how often it is there if not once.
    fn apply(&self, program: &mut [u8]) -> Result<(), usize> {
        let pattern = self.pattern();
        let same = |(byte, wanted): (&u8, &Option<u8>)| wanted.is_none_or(|wanted| *byte == wanted);
        let mut found = Vec::new();
        for (at, window) in program.windows(pattern.len()).enumerate() {
            if window.iter().zip(&pattern).all(same) {
                found.push(at);
            }
        }
        let [at] = found[..] else {
            return Err(found.len());
        };
        let code = &mut program[at..at + pattern.len()];
        let replacement = (self.replace)(code);
        code.copy_from_slice(&replacement);
        Ok(())
    }

    /// The code byte by byte.
    fn pattern(&self) -> Vec<Option<u8>> {
        self.code
            .split_whitespace()
            .map(|byte| u8::from_str_radix(byte, 16).ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code of the pattern, with even numbers in the open places.
    fn code(repair: &Repair) -> Vec<u8> {
        repair.pattern().iter().map(|byte| byte.unwrap_or(0x5a)).collect()
    }

    #[test]
    fn only_the_store_of_the_vector_goes() {
        let [vector, ..] = &REPAIRS;
        let mut program = [vec![0x90; 3], code(vector), vec![0x90; 5]].concat();
        let before = program.clone();
        assert_eq!(vector.apply(&mut program), Ok(()));
        assert_eq!(program[10..16], [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00]);
        program[10..16].copy_from_slice(&before[10..16]);
        assert_eq!(program, before);
    }

    #[test]
    fn virtual_interrupts_change_their_own_byte() {
        let [_, request, take_back] = &REPAIRS;
        let mut program = [code(request), vec![0x90; 5], code(take_back)].concat();
        assert_eq!(
            (request.apply(&mut program), take_back.apply(&mut program)),
            (Ok(()), Ok(()))
        );
        // orb $1, 0xffff5a5b(%rbx); nopl (%rax)
        assert_eq!(
            program[..10],
            [0x80, 0x8b, 0x5b, 0x5a, 0xff, 0xff, 0x01, 0x0f, 0x1f, 0x00]
        );
        assert_eq!(
            program[15..],
            [0x80, 0xa3, 0x5b, 0x5a, 0xff, 0xff, 0xfe, 0x0f, 0x1f, 0x00]
        );
    }

    #[test]
    fn code_that_is_not_known_stays() {
        for repair in &REPAIRS {
            assert_eq!(repair.apply(&mut [0x90; 100]), Err(0));
            assert_eq!(repair.apply(&mut []), Err(0));
            let mut twice = [code(repair), code(repair)].concat();
            let before = twice.clone();
            assert_eq!(repair.apply(&mut twice), Err(2));
            assert_eq!(twice, before);
        }
    }
}
