//! Processors on line.
//!
//! The kernel knows every processor of the MP table from its start; those above `maxcpus=` wait for the agent.

use std::fs;
use std::path::Path;

use crate::error::{FileError, failed};

/// The kernel's processors (Linux Documentation/ABI/testing/sysfs-devices-system-cpu).
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Why processors could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// Fewer than one, or more than there are.
    #[error("online is {wanted}; 1 to {present} are possible")]
    Count {
        /// Asked for.
        wanted: u32,
        /// Processors of the guest.
        present: u32,
    },
    /// A file of the kernel.
    #[error(transparent)]
    File(#[from] FileError),
}

/// How many are on line.
///
/// # Errors
/// The kernel's file cannot be read.
pub fn online() -> Result<u32, ProcessorError> {
    let path = Path::new(PROCESSORS).join("online");
    let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
    Ok(count(&text))
}

/// Brings the first `wanted` processors on line and takes the others off line; how many are on line then.
///
/// # Errors
/// There are not that many, or one did not start. One that does not stop is no error.
pub fn set_online(wanted: u32) -> Result<u32, ProcessorError> {
    set_online_in(Path::new(PROCESSORS), wanted)
}

fn set_online_in(directory: &Path, wanted: u32) -> Result<u32, ProcessorError> {
    let path = directory.join("present");
    let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
    let present = count(&text);
    if wanted == 0 || wanted > present {
        return Err(ProcessorError::Count { wanted, present });
    }
    let mut online = 1;
    // Processor 0 cannot be taken off line and has no such file.
    for number in 1..present {
        let path = directory.join(format!("cpu{number}/online"));
        let is_online = fs::read_to_string(&path).map_err(failed("read", &path))?.trim() == "1";
        let shall = number < wanted;
        if is_online == shall {
            online += u32::from(is_online);
            continue;
        }
        match fs::write(&path, if shall { "1" } else { "0" }) {
            Ok(()) => online += u32::from(shall),
            Err(source) if shall => return Err(failed("write", &path)(source).into()),
            // Something in the guest needs it still.
            Err(error) => {
                log::warn!("processor {number} stays on line: {error}");
                online += 1;
            }
        }
    }
    Ok(online)
}

/// Number of processors in a list like `0-3,5`.
fn count(list: &str) -> u32 {
    let range = |part: &str| -> Option<u32> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim()
        .split(',')
        .filter_map(range)
        .fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lists_are_counted() {
        let lists = ["0\n", "0-3\n", "0-3,5,7-8", "", "x", "3-1", "0-4294967295"];
        assert_eq!(lists.map(count), [1, 4, 7, 0, 0, 0, 0]);
    }

    #[test]
    fn the_first_are_on_line_and_the_others_off() {
        let directory = std::env::temp_dir().join(format!("bulkhead-processors-{}", std::process::id()));
        for number in 1..4 {
            let processor = directory.join(format!("cpu{number}"));
            fs::create_dir_all(&processor).unwrap();
            fs::write(processor.join("online"), if number == 3 { "1\n" } else { "0\n" }).unwrap();
        }
        fs::write(directory.join("present"), "0-3\n").unwrap();
        let states = || {
            [1, 2, 3].map(|number| fs::read_to_string(directory.join(format!("cpu{number}/online"))).unwrap())
        };
        assert_eq!(set_online_in(&directory, 2).unwrap(), 2);
        assert_eq!(states().map(|state| state.trim().to_owned()), ["1", "0", "0"]);
        assert_eq!(set_online_in(&directory, 4).unwrap(), 4);
        assert_eq!(states().map(|state| state.trim().to_owned()), ["1", "1", "1"]);
        for wanted in [0, 5] {
            let error = set_online_in(&directory, wanted).unwrap_err().to_string();
            assert_eq!(error, format!("online is {wanted}; 1 to 4 are possible"));
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
