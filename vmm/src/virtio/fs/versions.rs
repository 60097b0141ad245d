//! What files looked like when the guest opened them last.

use std::collections::HashMap;

/// Most files remembered; then all are forgotten, which costs the guest one read of each.
const MAX_FILES: usize = 1 << 16;

/// Bytes of a successful answer to `FUSE_GETATTR`: header, validity, attributes.
pub(super) const GETATTR_ANSWER_SIZE: usize = 16 + 16 + 88;

/// Where the attributes start in it.
const ATTRIBUTES: usize = 32;

/// A `FUSE_GETATTR` message.
pub(super) fn getattr(node: u64) -> [u8; 56] {
    let mut message = [0; 56];
    message[0] = 56;
    message[4] = 3;
    message[16..24].copy_from_slice(&node.to_le_bytes());
    message
}

/// Size and times of a file, which change with its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    size: [u8; 8],
    /// Seconds of modification and of change.
    seconds: [u8; 16],
    /// Nanoseconds of the same.
    nanoseconds: [u8; 8],
}

impl Version {
    /// From an answer to [`getattr`].
    pub(super) fn of(answer: &[u8; GETATTR_ANSWER_SIZE]) -> Self {
        fn field<const N: usize>(answer: &[u8; GETATTR_ANSWER_SIZE], offset: usize) -> [u8; N] {
            std::array::from_fn(|index| answer[ATTRIBUTES + offset + index])
        }
        Self {
            size: field(answer, 8),
            seconds: field(answer, 32),
            nanoseconds: field(answer, 52),
        }
    }
}

/// The versions, by node.
#[derive(Debug, Default)]
pub(super) struct Versions {
    files: HashMap<u64, Version>,
}

impl Versions {
    /// Notes the version of a file at its opening. Whether it was the same at the one before.
    pub(super) fn replace(&mut self, node: u64, version: Version) -> bool {
        if self.files.len() == MAX_FILES {
            self.files.clear();
        }
        self.files.insert(node, version) == Some(version)
    }

    /// The guest dropped the file.
    pub(super) fn forget(&mut self, node: u64) {
        self.files.remove(&node);
    }
}
