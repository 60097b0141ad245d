//! Device configuration space (virtio 1.2, 2.5).

use std::io;
use std::sync::Arc;

use super::interrupt::Interrupt;

/// Changes of a configuration space that a driver hears of.
#[derive(Debug, Default)]
pub struct Changes {
    generation: u32,
    /// Of the driver, if there is one.
    pub(super) interrupt: Option<Arc<Interrupt>>,
}

impl Changes {
    /// A driver is there from now on.
    pub fn activate(&mut self, interrupt: &Arc<Interrupt>) {
        self.interrupt = Some(Arc::clone(interrupt));
    }

    /// The driver is gone.
    pub fn reset(&mut self) {
        self.interrupt = None;
    }

    /// A number that differs when the space has changed between two reads of it.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The space has changed, as its driver knows.
    pub fn count(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// The space has changed: the driver is told. One that starts later reads it then.
    ///
    /// # Errors
    /// The guest cannot be interrupted.
    pub fn announce(&mut self) -> io::Result<()> {
        self.count();
        self.interrupt
            .as_ref()
            .map_or(Ok(()), |interrupt| interrupt.config_change())
    }
}

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
