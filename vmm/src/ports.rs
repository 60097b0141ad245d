//! I/O ports: the serial console, the keyboard controller's reset line and the agent's power port.

use std::sync::Arc;

use bulkhead_protocol::control::{ExitReason, POWER_OFF, POWER_PORT};
use vm_memory::{Bytes, GuestAddress};

use crate::console::{self, Console, ConsoleState};
use crate::memory::GuestMemory;

/// Command and status port of the keyboard controller.
const KEYBOARD_CONTROLLER: u16 = 0x64;
/// Its command to pulse the processor's reset line.
const RESET: u8 = 0xfe;
/// Word of the BIOS data area in which the kernel leaves the kind of reboot it wants
/// (arch/x86/kernel/reboot.c).
const REBOOT_FLAG: GuestAddress = GuestAddress(0x472);
/// "Warm". The command line has `reboot=panic_warm`, so the kernel writes it after a panic and only then.
const WARM: u16 = 0x1234;

/// All ports of the VM. A port nobody owns reads as all ones and ignores writes.
#[derive(Debug)]
pub struct Ports {
    console: Option<Console>,
    /// Guest memory, all of it.
    pub memory: Arc<GuestMemory>,
}

impl Ports {
    /// Wires the ports.
    pub fn new(console: Option<Console>, memory: Arc<GuestMemory>) -> Self {
        Self { console, memory }
    }

    /// State of the console, if there is one, for a snapshot.
    pub fn save(&self) -> Option<ConsoleState> {
        self.console.as_ref().map(Console::save)
    }

    /// The guest reads.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        if let Some((console, register)) = self.console(port) {
            *byte = console.read(register);
        } else if port == KEYBOARD_CONTROLLER {
            // Input buffer empty: ready for a command.
            *byte = 0;
        }
    }

    /// The guest writes; some writes end the VM.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        let &[byte] = data else { return None };
        if let Some((console, register)) = self.console(port) {
            console.write(register, byte);
        } else if port == KEYBOARD_CONTROLLER && byte == RESET {
            let warm = self
                .memory
                .read_obj::<u16>(REBOOT_FLAG)
                .is_ok_and(|flag| flag == WARM);
            return Some(if warm {
                ExitReason::Panic
            } else {
                ExitReason::Reboot
            });
        } else if port == POWER_PORT && byte == POWER_OFF {
            return Some(ExitReason::PowerOff);
        }
        None
    }

    fn console(&self, port: u16) -> Option<(&Console, u8)> {
        let register = port.checked_sub(console::PORT).filter(|register| *register < 8)?;
        Some((self.console.as_ref()?, register as u8))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn ports() -> Ports {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        Ports::new(None, Arc::new(memory))
    }

    #[test]
    fn panic_reboot_and_power_off_are_told_apart() {
        let ports = ports();
        assert_eq!(ports.write(0x64, &[0xfe]), Some(ExitReason::Reboot));
        ports.memory.write_obj(WARM, REBOOT_FLAG).unwrap();
        assert_eq!(ports.write(0x64, &[0xfe]), Some(ExitReason::Panic));
        assert_eq!(ports.write(POWER_PORT, &[POWER_OFF]), Some(ExitReason::PowerOff));
    }

    #[test]
    fn other_accesses_do_nothing() {
        let ports = ports();
        for port in [0, 0x3f8, 0x64, POWER_PORT, 0xffff] {
            assert_eq!(ports.write(port, &[0]), None);
            assert_eq!(ports.write(port, &[0xfe, 0xfe]), None);
        }
        let mut data = [0; 4];
        ports.read(0x64, &mut data);
        assert_eq!(data, [0xff; 4]);
        ports.read(0x3f8, &mut data[..1]);
        assert_eq!(data[0], 0xff);
        ports.read(0x64, &mut data[..1]);
        assert_eq!(data[0], 0);
    }
}
