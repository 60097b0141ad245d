//! What a file server has to know to go on where another one was.

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

const FUSE_INIT: u32 = 26;

/// Bytes of `FUSE_INIT`: header, `struct fuse_init_in`. Kernels before 5.17 send less of it, and the rest counts as zeroes.
const INIT_SIZE: usize = 40 + 64;

/// Bytes of a successful answer to it: header, `struct fuse_init_out`.
pub(super) const INIT_ANSWER_SIZE: usize = 16 + 64;

/// What the guest knows of a tree that it has mounted.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    /// The message by which it mounted the tree, with what it can do.
    pub mount: Vec<u8>,
    /// Files that it knows and has open, as the library writes them: each with the directory it is in and its name there.
    pub files: Vec<u8>,
}

impl Known {
    /// The message by which a tree is mounted, of what begins with it.
    pub(super) fn mount(message: &[u8]) -> Option<Vec<u8>> {
        message.get(..INIT_SIZE).map(<[u8]>::to_vec)
    }

    /// # Errors
    /// There is not enough memory.
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(io::Error::other)
    }

    /// # Errors
    /// `bytes` are not what [`encode`](Self::encode) made.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let known = postcard::take_from_bytes::<Self>(bytes);
        let (known, rest) = known.map_err(|error| DeviceError::Backend(io::Error::other(error)))?;
        let opcode = known.mount.get(4..8);
        if !rest.is_empty() || known.mount.len() != INIT_SIZE || opcode != Some(&FUSE_INIT.to_le_bytes()) {
            return Err(DeviceError::Protocol("known files of another file server"));
        }
        Ok(known)
    }
}

/// A file in memory: the library writes and reads what it knows through a descriptor.
#[derive(Debug)]
pub(super) struct Scratch(File);

impl Scratch {
    /// An empty one.
    ///
    /// # Errors
    /// No more descriptors.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(memfd_create(c"files", MemFdCreateFlag::MFD_CLOEXEC)?.into()))
    }

    /// Another handle of the same file.
    ///
    /// # Errors
    /// No more descriptors.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Makes `data` its content, and returns it at its beginning.
    ///
    /// # Errors
    /// No more descriptors, not enough memory.
    pub(super) fn fill(&mut self, data: &[u8]) -> io::Result<File> {
        self.empty()?;
        self.0.write_all(data)?;
        self.0.rewind()?;
        self.0.try_clone()
    }

    /// Takes its content out.
    ///
    /// # Errors
    /// Not enough memory.
    pub(super) fn take(&mut self) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        self.0.rewind()?;
        self.0.read_to_end(&mut content)?;
        self.empty()?;
        Ok(content)
    }

    /// Gives its memory back.
    ///
    /// # Errors
    /// None that a file in memory has.
    pub(super) fn empty(&mut self) -> io::Result<()> {
        self.0.set_len(0)?;
        self.0.rewind()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn known() -> Known {
        let mut mount = vec![0; INIT_SIZE];
        mount[4] = 26;
        Known {
            mount,
            files: b"files".to_vec(),
        }
    }

    #[test]
    fn it_comes_back_as_it_was() {
        let bytes = known().encode().unwrap();
        assert_eq!(Known::decode(&bytes).unwrap(), known());
    }

    #[test]
    fn what_is_not_it_is_refused() {
        let bytes = known().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Known::decode(&bytes[..length]).is_err(), "{length}");
        }
        assert!(Known::decode(&[&bytes[..], &[0]].concat()).is_err());
        let mut another = known();
        another.mount[4] = 38;
        assert!(Known::decode(&another.encode().unwrap()).is_err());
        let mut short = known();
        short.mount.pop();
        assert!(Known::decode(&short.encode().unwrap()).is_err());
        assert_eq!(Known::mount(&[0; INIT_SIZE - 1]), None);
    }

    #[test]
    fn the_scratch_file_holds_what_was_put_in_last() {
        let mut scratch = Scratch::new().unwrap();
        let mut read = Vec::new();
        scratch.fill(b"something long").unwrap();
        scratch.fill(b"short").unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(read, b"short");
        assert_eq!(scratch.take().unwrap(), b"short");
        assert_eq!(scratch.take().unwrap(), b"");
    }

    proptest! {
        #[test]
        fn any_bytes_are_it_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(known) = Known::decode(&bytes) {
                prop_assert_eq!(known.mount.len(), INIT_SIZE);
            }
        }
    }
}
