//! The kind of processor a guest runs on.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::arch::cpuid;

/// How the processors differ.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("CPUID leaf {leaf:#x}.{index:#x} was {saved} and is {now}")]
pub struct ProcessorError {
    leaf: u32,
    index: u32,
    saved: String,
    now: String,
}

/// CPUID of the first vCPU. What the guest found there it goes on to use.
#[derive(Debug, Serialize, Deserialize)]
pub struct Processor(Vec<kvm_cpuid_entry2>);

impl Processor {
    /// The processor of guests with `count` vCPUs on a host that supports `supported`.
    pub fn new(supported: &CpuId, count: u8) -> Self {
        Self(cpuid::normalize(supported, 0, count).as_slice().to_vec())
    }

    /// Whether a guest that began on this one can go on on `now`.
    ///
    /// # Errors
    /// [`ProcessorError`] tells the first difference.
    pub fn check(&self, now: &Self) -> Result<(), ProcessorError> {
        let key = |entry: &kvm_cpuid_entry2| (entry.function, entry.index);
        let find = |entries: &[kvm_cpuid_entry2], wanted| {
            entries.iter().find(|entry| key(entry) == wanted).map(registers)
        };
        for (leaf, index) in self.0.iter().chain(&now.0).map(key) {
            let (saved, now) = (find(&self.0, (leaf, index)), find(&now.0, (leaf, index)));
            if saved != now {
                return Err(ProcessorError {
                    leaf,
                    index,
                    saved: text(saved),
                    now: text(now),
                });
            }
        }
        Ok(())
    }
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn text(registers: Option<[u32; 4]>) -> String {
    registers.map_or_else(|| "missing".to_owned(), |registers| format!("{registers:x?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        }
    }

    #[test]
    fn the_leaf_that_differs_is_named() {
        let one = Processor(vec![leaf(0, 7), leaf(7, 1)]);
        assert_eq!(one.check(&Processor(vec![leaf(7, 1), leaf(0, 7)])), Ok(()));
        let error = |other: Processor| one.check(&other).map_err(|error| error.to_string());
        let other = error(Processor(vec![leaf(0, 7), leaf(7, 0x21)]));
        assert_eq!(
            other.unwrap_err(),
            "CPUID leaf 0x7.0x0 was [1, 0, 0, 0] and is [21, 0, 0, 0]"
        );
        let more = error(Processor(vec![leaf(0, 7), leaf(7, 1), leaf(0xd, 3)]));
        assert_eq!(
            more.unwrap_err(),
            "CPUID leaf 0xd.0x0 was missing and is [3, 0, 0, 0]"
        );
    }
}
