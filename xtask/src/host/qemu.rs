//! Avoids a fault of QEMU's emulation of AMD's SVM that stops guests of the emulated host.
//!
//! `VMRUN` with an external interrupt to inject (APM volume 2, section 15.20) delivers the interrupt at once, and also
//! leaves its vector where QEMU keeps an exception that is still to be delivered. If the processor's thread is asked
//! to stop before anything else overwrites that (a timer, the end of an instruction budget, a request of another
//! processor), the vector is delivered a second time, whatever the guest's interrupt flag says. A guest kernel then
//! waits for ever for a lock it holds itself, or ends in a triple fault. Seen in QEMU 7.2 and 10.0, mostly in the
//! deterministic mode (`exception_index` is set in `helper_vmrun`).
//!
//! The store is not needed, so it is replaced by an instruction that does nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The four stores of the case "external interrupt" in the code that Debian's compiler makes, as hexadecimal bytes: the
/// error code, the vector, "not by an instruction", "no next instruction". A dot is any byte: the places in QEMU's
/// state change with its version.
const STORES: &str =
    "44 89 ab . . . .  89 b3 . . . .  c7 83 . . . . 00 00 00 00  48 c7 83 . . . . ff ff ff ff";

/// Where in [`STORES`] the vector is stored.
const VECTOR: std::ops::Range<usize> = 7..13;

/// `nopw 0(%rax,%rax,1)`: one instruction of the same length.
const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Takes the store out of the program at `path`. Where the code is not the known one (another version, which may need
/// another pattern or none), the program stays as it is and a warning says what to expect.
///
/// # Errors
/// The program cannot be read or written.
pub fn repair(path: &Path) -> Result<()> {
    let mut program = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if let Err(times) = replace(&mut program) {
        eprintln!(
            "warning: the code of QEMU that injects interrupts into nested guests was found {times} times, not once; \
             it stays as it is, and guests of the emulated host may stop now and then (xtask/src/host/qemu.rs)"
        );
        return Ok(());
    }
    fs::write(path, program).with_context(|| format!("cannot write {}", path.display()))
}

/// Replaces the store, or tells how often its code is there if not once.
fn replace(program: &mut [u8]) -> Result<(), usize> {
    let stores = stores();
    let same = |(byte, wanted): (&u8, &Option<u8>)| wanted.is_none_or(|wanted| *byte == wanted);
    let mut found = Vec::new();
    for (at, window) in program.windows(stores.len()).enumerate() {
        if window.iter().zip(&stores).all(same) {
            found.push(at);
        }
    }
    let [at] = found[..] else {
        return Err(found.len());
    };
    program[at + VECTOR.start..at + VECTOR.end].copy_from_slice(&NOP);
    Ok(())
}

/// [`STORES`] byte by byte.
fn stores() -> Vec<Option<u8>> {
    STORES
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn code() -> Vec<u8> {
        let bytes: Vec<u8> = stores().into_iter().map(|byte| byte.unwrap_or(0x5a)).collect();
        assert_eq!(bytes.len(), 34);
        bytes
    }

    #[test]
    fn only_the_store_of_the_vector_goes() {
        let mut program = [vec![0x90; 3], code(), vec![0x90; 5]].concat();
        let before = program.clone();
        replace(&mut program).unwrap();
        assert_eq!(program[3 + VECTOR.start..3 + VECTOR.end], NOP);
        program[3 + VECTOR.start..3 + VECTOR.end].copy_from_slice(&before[3 + VECTOR.start..3 + VECTOR.end]);
        assert_eq!(program, before);
    }

    #[test]
    fn code_that_is_not_known_stays() {
        assert_eq!(replace(&mut [0x90; 100]), Err(0));
        assert_eq!(replace(&mut []), Err(0));
        let mut twice = [code(), code()].concat();
        assert_eq!(replace(&mut twice), Err(2));
        assert_eq!(twice, [code(), code()].concat());
    }
}
