//! Ends of processes and of the VM, and who is told.

use super::*;

impl Sandbox {
    /// Tells exits in their order: the event, then whoever waits.
    pub(super) fn tell(&self, container: &str, record: &mut Record, told: Vec<ToldExit>) {
        for ToldExit { exec, exit } in told {
            if let Some(streams) = record.streams.get(&exec) {
                self.0.streams.close_stdin(streams);
            }
            self.0.sink.event(SandboxEvent::Exited {
                container: container.into(),
                exec: exec.clone(),
                exit,
            });
            if let Some(sender) = record.exits.get(&exec) {
                sender.send_replace(Some(exit));
            }
        }
    }

    /// A process has ended, says the agent.
    pub(super) fn process_exited(&self, container: &str, exec: &str, status: u32) {
        let exit = Exit {
            status: status.min(255),
            at_ns: now_ns(),
        };
        let begins_to_hold = self.with(container, |record| {
            let held = record.machine.is_holding();
            let told = record.machine.exited(exec, exit);
            self.tell(container, record, told);
            Ok(record.machine.is_holding() && !held)
        });
        // Once: a guest can send the same exit as often as it likes.
        if begins_to_hold.is_ok_and(|begins| begins) {
            let sandbox = self.clone();
            let container = container.to_owned();
            tokio::spawn(async move {
                tokio::time::sleep(HOLD_LIMIT).await;
                let _ = sandbox.with(&container, |record| {
                    let told = record.machine.force_release();
                    sandbox.tell(&container, record, told);
                    Ok(())
                });
            });
        }
    }

    /// The VM has ended: so has everything in it.
    pub(super) fn vm_ended(&self, end: &VmEnd) {
        let expected = self.is_stopping();
        if expected {
            log::debug!("sandbox {}: the virtual machine has ended: {end}", self.0.id);
        } else {
            log::error!("sandbox {}: the virtual machine has ended: {end}", self.0.id);
        }
        // What the guest wrote before its end is in the FIFOs: nothing more will come.
        self.0.streams.all_ended();
        let exit = killed_now();
        let mut state = self.lock();
        for (id, record) in &mut state.containers {
            let alive = record.machine.is_alive();
            let told = record.machine.lost(exit);
            if alive && !expected {
                if end.out_of_memory {
                    self.0.sink.event(SandboxEvent::OutOfMemory {
                        container: id.clone(),
                    });
                }
                self.0.sink.event(SandboxEvent::Lost {
                    container: id.clone(),
                    reason: end.to_string(),
                });
            }
            if alive {
                self.tell(id, record, told);
            } else {
                // Never started: whoever waits gets an answer, but there was no exit to announce.
                for exit in told {
                    if let Some(sender) = record.exits.get(&exit.exec) {
                        sender.send_replace(Some(exit.exit));
                    }
                }
            }
        }
        drop(state);
        // Last: whoever waits for it finds every container ended.
        self.0.end.send_replace(Some(if expected {
            Exit { status: 0, ..exit }
        } else {
            exit
        }));
    }
}
