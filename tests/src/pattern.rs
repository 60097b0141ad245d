//! A byte stream in which every position is recognisable: loss, repetition and reordering all show.

use std::io::{self, Read, Write};

const CHUNK: usize = 64 * 1024;

fn fill(seed: u64, first_word: u64, buffer: &mut [u8]) {
    for (index, word) in (first_word..).zip(buffer.chunks_mut(8)) {
        // SplitMix64's output function.
        let mut value = index.wrapping_add(seed << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(value ^ (value >> 31)).to_le_bytes()[..word.len()]);
    }
}

/// Writes the first `length` bytes of pattern `seed`.
///
/// # Errors
/// What `to` reports.
pub fn write(seed: u64, length: u64, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    while done < length {
        fill(seed, done / 8, &mut buffer);
        let size = usize::try_from(length - done).map_or(CHUNK, |left| left.min(CHUNK));
        to.write_all(&buffer[..size])?;
        done += size as u64;
    }
    to.flush()
}

/// Reads `from` to its end and compares it with pattern `seed`; returns the number of bytes.
///
/// # Errors
/// What `from` reports, or `InvalidData` naming the first byte that differs.
pub fn check(seed: u64, from: &mut impl Read) -> io::Result<u64> {
    let (mut got, mut expected) = (Vec::with_capacity(CHUNK), vec![0; CHUNK]);
    let mut done = 0;
    loop {
        got.clear();
        let size = from.take(CHUNK as u64).read_to_end(&mut got)?;
        fill(seed, done / 8, &mut expected);
        if got != expected[..size] {
            let at = got.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            let message = format!("byte {} of pattern {seed} differs", done + at as u64);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        done += size as u64;
        if size < CHUNK {
            return Ok(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(seed: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(seed, length, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn check_accepts_what_write_made() {
        for length in [0, 1, 7, 65536, 65537, 200_001] {
            assert_eq!(check(3, &mut pattern(3, length).as_slice()).unwrap(), length);
        }
    }

    #[test]
    fn check_sees_loss_reordering_and_another_seed() {
        let bytes = pattern(3, 200_000);
        let lost = [&bytes[..70_000], &bytes[70_001..]].concat();
        let swapped = [&bytes[65536..131_072], &bytes[..65536], &bytes[131_072..]].concat();
        for wrong in [lost, swapped, pattern(4, 200_000)] {
            assert_eq!(
                check(3, &mut wrong.as_slice()).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
    }
}
