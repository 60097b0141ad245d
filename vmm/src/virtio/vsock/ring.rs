//! Bounded byte buffer.

use std::io::IoSlice;

/// Bytes that wait for the far end, at most `CAPACITY`. Takes no memory while it is empty.
#[derive(Debug, Default)]
pub struct Ring<const CAPACITY: usize> {
    data: Box<[u8]>,
    head: usize,
    len: usize,
}

impl<const CAPACITY: usize> Ring<CAPACITY> {
    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `len` bytes, produced by one or two calls of `fill` with the offset in the new bytes and
    /// the place to fill. The caller has seen that there is room; without, nothing is done.
    ///
    /// # Errors
    /// What `fill` returns; the buffer is then as before.
    pub fn append<E>(
        &mut self,
        len: usize,
        mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        debug_assert!(len <= CAPACITY - self.len);
        if len == 0 || len > CAPACITY - self.len {
            return Ok(());
        }
        if self.data.is_empty() {
            self.data = vec![0; CAPACITY].into_boxed_slice();
        }
        let tail = (self.head + self.len) % CAPACITY;
        let first = len.min(CAPACITY - tail);
        fill(0, &mut self.data[tail..tail + first])?;
        if first < len {
            fill(first, &mut self.data[..len - first])?;
        }
        self.len += len;
        Ok(())
    }

    /// The bytes, oldest first; the second slice may be empty.
    pub fn slices(&self) -> [IoSlice<'_>; 2] {
        let first = self.len.min(self.data.len() - self.head);
        [
            IoSlice::new(&self.data[self.head..self.head + first]),
            IoSlice::new(&self.data[..self.len - first]),
        ]
    }

    /// Drops the `count` oldest bytes.
    pub fn consume(&mut self, count: usize) {
        self.len -= count.min(self.len);
        if self.len == 0 {
            *self = Self::default();
        } else {
            self.head = (self.head + count) % CAPACITY;
        }
    }
}
