//! The serial console: a 16550 whose output is kept in a ring, so that an error can show its last lines.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// First I/O port of COM1; eight ports.
pub const PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const GSI: u32 = 4;
/// Bytes of output kept.
const CAPACITY: usize = 16 << 10;

/// The last output of the console. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Ring(Arc<Mutex<VecDeque<u8>>>);

impl Ring {
    /// The last `limit` bytes at most, from the start of a line, invalid UTF-8 replaced.
    pub fn tail(&self, limit: usize) -> String {
        let bytes = lock(&self.0);
        let cut = bytes.len().saturating_sub(limit);
        let mut tail: Vec<u8> = bytes.iter().skip(cut).copied().collect();
        if cut > 0
            && let Some(end) = tail.iter().position(|byte| *byte == b'\n')
        {
            tail.drain(..=end);
        }
        String::from_utf8_lossy(&tail).into_owned()
    }
}

impl Write for Ring {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = lock(&self.0);
        bytes.extend(data);
        let excess = bytes.len().saturating_sub(CAPACITY);
        bytes.drain(..excess);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The UART. It has no input.
pub struct Console(Mutex<Serial<Line, NoEvents, Ring>>);

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

/// Registers of the UART.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

/// The state cannot be that of a UART.
#[derive(Debug, thiserror::Error)]
#[error("State of the console holds {0} bytes of input, more than a UART can")]
pub struct ConsoleError(usize);

impl Console {
    /// Creates the UART; `interrupt` is the irqfd of [`GSI`], `ring` takes the output.
    pub fn new(interrupt: EventFd, ring: Ring) -> Self {
        Self(Mutex::new(Serial::new(Line(interrupt), ring)))
    }

    /// Registers for a snapshot. What was put out is not part of it.
    pub fn save(&self) -> ConsoleState {
        let state = lock(&self.0).state();
        ConsoleState {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// As [`new`](Self::new), with registers as they were saved.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn restore(interrupt: EventFd, ring: Ring, state: &ConsoleState) -> Result<Self, ConsoleError> {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        // Besides, an interrupt that is pending is raised again, and the eventfd takes it.
        Serial::from_state(&state, Line(interrupt), NoEvents, ring)
            .map(|serial| Self(Mutex::new(serial)))
            .map_err(|_| ConsoleError(state.in_buffer.len()))
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.0).read(offset)
    }

    /// The guest writes register `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        // Only the ring and the eventfd can fail, and neither does in a way the guest could repair.
        let _ = lock(&self.0).write(offset, value);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ring_keeps_the_last_lines() {
        let mut ring = Ring::default();
        for line in 0..5000 {
            writeln!(ring, "line {line}").unwrap();
        }
        assert!(lock(&ring.0).len() <= CAPACITY);
        let tail = ring.tail(25);
        assert_eq!(tail, "line 4998\nline 4999\n");
        assert!(ring.tail(usize::MAX).ends_with("line 4999\n"));
    }

    #[test]
    fn output_of_the_uart_reaches_the_ring() {
        let ring = Ring::default();
        let console = Console::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), ring.clone());
        for byte in b"panic \xff\n" {
            console.write(0, *byte);
        }
        assert_eq!(ring.tail(100), "panic \u{fffd}\n");
        // Line status: transmitter empty.
        assert_eq!(console.read(5) & 0x60, 0x60);
    }
}
