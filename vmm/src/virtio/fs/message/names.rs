//! Names in FUSE messages.
//!
//! The library hands the names of new, removed and renamed entries to `mkdirat`, `unlinkat`, `renameat2` and
//! the like as they come, and has the name of a lookup resolved inside the shared tree only where the host's
//! kernel has `openat2`. With `..` or `/` in them they would lead out of the tree, so what is not the name of
//! one entry is refused here. A kernel resolves paths itself and never sends one.

use crate::virtio::DeviceError;

/// Where a message has its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// Bytes of fixed argument between header and first name.
    offset: usize,
    /// Names behind one another, each with a zero at its end.
    count: usize,
}

/// Names of the requests that are about an entry of a directory (Linux `include/uapi/linux/fuse.h`).
pub(super) fn position(opcode: u32) -> Option<Names> {
    let (offset, count) = match opcode {
        // LOOKUP, SYMLINK (the target that follows may be any text), UNLINK, RMDIR
        1 | 6 | 10 | 11 => (0, 1),
        // MKDIR, LINK
        9 | 13 => (8, 1),
        // MKNOD, CREATE
        8 | 35 => (16, 1),
        // RENAME, RENAME2
        12 => (8, 2),
        45 => (16, 2),
        _ => return None,
    };
    Some(Names { offset, count })
}

/// Checks the names in `body`, the message behind its header.
///
/// # Errors
/// A name is empty, has no end, or is a path.
pub(super) fn check(body: &[u8], names: Names) -> Result<(), DeviceError> {
    let incomplete = || DeviceError::Protocol("FUSE name without an end");
    let mut rest = body.get(names.offset..).ok_or_else(incomplete)?;
    for _ in 0..names.count {
        let end = rest.iter().position(|byte| *byte == 0).ok_or_else(incomplete)?;
        let (name, tail) = rest.split_at(end);
        if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Err(DeviceError::Protocol(
                "FUSE name that is not the name of an entry",
            ));
        }
        rest = tail.get(1..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: Names = Names { offset: 8, count: 1 };
    const TWO: Names = Names { offset: 0, count: 2 };

    #[test]
    fn names_of_entries_pass() {
        for name in ["a", "...", "..a", "a..", ".hidden", "with space", "\u{e4}"] {
            let body = [&[0; 8], name.as_bytes(), b"\0"].concat();
            assert!(check(&body, ONE).is_ok(), "{name}");
        }
        assert!(check(b"old\0new\0", TWO).is_ok());
        // The target of a symbolic link, which is behind the checked name.
        assert!(check(b"name\0../../etc\0", Names { offset: 0, count: 1 }).is_ok());
    }

    #[test]
    fn paths_and_pieces_are_refused() {
        for name in ["", ".", "..", "../x", "/etc", "a/b", "a/"] {
            let body = [&[0; 8], name.as_bytes(), b"\0"].concat();
            assert!(check(&body, ONE).is_err(), "{name}");
        }
        for body in [
            &b"old\0../new\0"[..],
            b"../old\0new\0",
            b"old\0",
            b"old\0new",
            b"",
        ] {
            assert!(check(body, TWO).is_err(), "{body:?}");
        }
        assert!(check(b"short", ONE).is_err());
    }

    proptest! {
        #[test]
        fn what_passes_names_one_entry(body in proptest::collection::vec(any::<u8>(), 0..40)) {
            if check(&body, TWO).is_ok() {
                for name in body.split(|byte| *byte == 0).take(2) {
                    prop_assert!(!name.is_empty() && !name.contains(&b'/') && name != b"..");
                }
            }
        }
    }
}
