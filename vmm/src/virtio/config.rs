//! Device configuration space (virtio 1.2, 2.5).

/// Copies the bytes at `offset` of a configuration space to `data`; those beyond its end read as zero.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..));
    if let Some(rest) = rest {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads_beyond_the_end_are_zero() {
        let mut data = [0xff; 4];
        super::read(&[1, 2, 3, 4, 5, 6], 4, &mut data);
        assert_eq!(data, [5, 6, 0, 0]);
        for offset in [6, 7, u64::MAX] {
            data.fill(0xff);
            super::read(&[1, 2, 3, 4, 5, 6], offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
    }
}
