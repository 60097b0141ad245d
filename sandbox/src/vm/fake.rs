//! A process that stands for the VMM in tests.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, OnceLock};

use bulkhead_protocol::control::Reply;
use tokio::sync::{mpsc, watch};

use super::{Command, Started, Vm, VmEnd};
use crate::spawn;

impl Vm {
    /// A process that does nothing in the VMM's place, and answers to every request.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn fake() -> Self {
        Self::pretend(true)
    }

    /// As [`Vm::fake`]; with `answers` false it never answers.
    pub(super) fn pretend(answers: bool) -> Self {
        let mut command = tokio::process::Command::new("sleep");
        let mut child = command.arg("1000").kill_on_drop(true).spawn().unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let verdict = Arc::new(OnceLock::<String>::new());
        let (commands, mut receiver) = mpsc::unbounded_channel::<Command>();
        tokio::spawn(async move {
            let mut unanswered = Vec::new();
            while let Some(command) = receiver.recv().await {
                if answers {
                    let _ = command.reply.send(Ok(Reply::Done));
                } else {
                    unanswered.push(command);
                }
            }
        });
        let (end_sender, end) = watch::channel(None);
        let said = verdict.clone();
        tokio::spawn(async move {
            let status = child.wait().await.unwrap();
            end_sender.send_replace(Some(Arc::new(VmEnd {
                reason: said.get().cloned().unwrap_or_else(|| status.to_string()),
                ..VmEnd::default()
            })));
        });
        Self {
            commands,
            end,
            memory: watch::channel(0).1,
            started: Started {
                pid,
                start_time: spawn::start_time(pid).unwrap(),
            },
            verdict,
        }
    }
}
