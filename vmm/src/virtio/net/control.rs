//! Commands of the driver (virtio 1.2, 5.1.6.5). There is one: how many pairs of queues are on.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::device::Net;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue};
use crate::virtio::{DeviceError, Turn};

/// Commands before other devices get their turn.
const BUDGET: usize = 16;

/// The control queue of an active device.
#[derive(Debug)]
pub(super) struct Control {
    /// Its number.
    pub(super) index: usize,
    pub(super) queue: DeviceQueue,
}

/// The number of pairs that a command asks for; none: it is another command, or not one at all.
fn wanted_pairs(memory: &GuestMemory, chain: &Chain) -> Result<Option<usize>, DeviceError> {
    // Class, command, and what belongs to it (5.1.6.5, 5.1.6.5.5).
    let mut command = [0; 4];
    if chain.readable_len() != command.len() {
        return Ok(None);
    }
    chain.read_at(memory, 0, &mut command)?;
    let [class, command, low, high] = command;
    let known = [class, command].map(u32::from) == [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET];
    Ok(known.then(|| u16::from_le_bytes([low, high]).into()))
}

impl Net {
    /// Answers the driver's commands. It waits for each, so none is left without an answer.
    pub(super) fn serve_control(&mut self) -> Result<(), DeviceError> {
        let Some(mut control) = self.control.take() else {
            return Ok(());
        };
        let turn = control.queue.serve(BUDGET, |memory, chain| {
            if chain.writable_len() == 0 {
                return Err(DeviceError::Protocol("command has no room for an answer"));
            }
            let done = match wanted_pairs(memory, chain)? {
                Some(count) => self.switch(count),
                None => false,
            };
            let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            chain.write_at(memory, 0, &[answer as u8])?;
            Ok(1)
        });
        match turn {
            Ok(turn) => {
                if turn == Turn::Again
                    && let Some(kick) = self.kicks.get(control.index)
                {
                    // It can fail only if the counter is full: then it is readable.
                    let _ = kick.write(1);
                }
                self.control = Some(control);
                Ok(())
            }
            Err(error) => {
                self.stop();
                Err(error)
            }
        }
    }
}
