//! Which calls are let in: none before a connection's first call, and nothing new while the guest is frozen.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use crate::error::Error;

/// Calls that a frozen guest carries out as well: they start nothing and write no file.
const ALWAYS: [&str; 12] = [
    "ContainerStats",
    "Events",
    "Freeze",
    "Hello",
    "ListProcesses",
    "ReattachStreams",
    "ResizeTerminal",
    "Resume",
    "Shutdown",
    "SignalProcess",
    "Thaw",
    "WaitProcess",
];

/// Calls that make a connection's first one; they judge themselves.
const FIRST: [&str; 2] = ["Hello", "Resume"];

/// Moments of the change from one connection to the next, in microseconds of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    /// The old one's end was noticed.
    pub lost: u64,
    /// The new one was there.
    pub ready: u64,
}

#[derive(Debug, Default)]
struct State {
    /// The connection has had its first call.
    greeted: bool,
    /// The connection is not the first one.
    changed: bool,
    change: Change,
    closed: bool,
    working: usize,
}

/// The agent's gate. One for all connections.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    idle: Notify,
}

/// A call that changes something is being carried out.
#[derive(Debug)]
pub struct Working(Arc<Gate>);

impl Drop for Working {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.working = state.working.saturating_sub(1);
        if state.working == 0 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection has ended.
    pub fn lost(&self, uptime_us: u64) {
        let mut state = self.state();
        state.greeted = false;
        state.changed = true;
        state.change.lost = uptime_us;
    }

    /// There is another one.
    pub fn regained(&self, uptime_us: u64) {
        self.state().change.ready = uptime_us;
    }

    /// A `Hello`: the first call of the first connection; later on it only asks whether the agent answers.
    ///
    /// # Errors
    /// The connection is a further one and has not had its `Resume`.
    pub fn hello(&self) -> Result<(), Error> {
        let mut state = self.state();
        if state.changed && !state.greeted {
            return Err(Error::NotResumed);
        }
        state.greeted = true;
        Ok(())
    }

    /// A `Resume` has been carried out.
    pub fn resumed(&self) -> Change {
        let mut state = self.state();
        state.greeted = true;
        state.change
    }

    /// Whether a call may be carried out.
    ///
    /// # Errors
    /// The connection has not had its first call, or the guest is frozen.
    pub fn admit(&self, method: &str) -> Result<(), Error> {
        if FIRST.contains(&method) {
            return Ok(());
        }
        let state = self.state();
        if !state.greeted {
            return Err(if state.changed {
                Error::NotResumed
            } else {
                Error::NotGreeted
            });
        }
        if state.closed && !ALWAYS.contains(&method) {
            return Err(Error::Frozen);
        }
        Ok(())
    }

    /// Notes that something is being changed, until the value is dropped.
    pub fn work(self: &Arc<Self>) -> Working {
        self.state().working += 1;
        Working(Arc::clone(self))
    }

    /// Lets no new work in.
    pub fn close(&self) {
        self.state().closed = true;
    }

    /// Lets work in.
    pub fn open(&self) {
        self.state().closed = false;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Waits until nothing is being changed any more.
    ///
    /// # Errors
    /// Something still is after `limit`.
    pub async fn idle(&self, limit: Duration) -> Result<(), Error> {
        let wait = async {
            loop {
                let idle = self.idle.notified();
                if self.state().working == 0 {
                    return;
                }
                idle.await;
            }
        };
        let waited = tokio::time::timeout(limit, wait).await;
        waited.map_err(|_| Error::Busy(self.state().working))
    }
}

/// Puts the gate before every method of a service. Streams ask it themselves.
pub fn guard(services: HashMap<String, Service>, gate: &Arc<Gate>) -> HashMap<String, Service> {
    let before = |(name, method): (String, _)| {
        let guarded = Guarded {
            name: name.clone(),
            method,
            gate: Arc::clone(gate),
        };
        (name, Box::new(guarded) as Box<dyn MethodHandler + Send + Sync>)
    };
    let guarded = |(name, mut service): (String, Service)| {
        service.methods = service.methods.into_iter().map(before).collect();
        (name, service)
    };
    services.into_iter().map(guarded).collect()
}

struct Guarded {
    name: String,
    method: Box<dyn MethodHandler + Send + Sync>,
    gate: Arc<Gate>,
}

#[async_trait]
impl MethodHandler for Guarded {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        match self.gate.admit(&self.name) {
            Ok(()) => self.method.handler(context, request).await,
            Err(error) => Ok(ttrpc::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nothing_before_the_first_call() {
        let gate = Gate::default();
        assert!(matches!(gate.admit("SetupSandbox"), Err(Error::NotGreeted)));
        assert!(gate.admit("Hello").is_ok() && gate.admit("Resume").is_ok());
        gate.hello().unwrap();
        assert!(gate.admit("SetupSandbox").is_ok());
        gate.lost(5);
        gate.regained(7);
        assert!(matches!(gate.admit("SetupSandbox"), Err(Error::NotResumed)));
        assert!(matches!(gate.hello(), Err(Error::NotResumed)));
        assert!(matches!(gate.admit("Shutdown"), Err(Error::NotResumed)));
        let change = gate.resumed();
        assert_eq!((change.lost, change.ready), (5, 7));
        assert!(gate.admit("SetupSandbox").is_ok());
        gate.hello().unwrap();
    }

    #[test]
    fn a_closed_gate_lets_questions_and_signals_in() {
        let gate = Gate::default();
        gate.hello().unwrap();
        gate.close();
        for method in ["SignalProcess", "WaitProcess", "ContainerStats", "Thaw", "Freeze"] {
            assert!(gate.admit(method).is_ok(), "{method}");
        }
        for method in ["CreateContainer", "ExecProcess", "RemoveVolume", "PauseContainer"] {
            assert!(matches!(gate.admit(method), Err(Error::Frozen)), "{method}");
        }
        gate.open();
        assert!(gate.admit("CreateContainer").is_ok());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn idle_when_the_last_has_ended() {
        let gate = Arc::new(Gate::default());
        gate.idle(Duration::ZERO).await.unwrap();
        let (one, two) = (gate.work(), gate.work());
        let short = gate.idle(Duration::from_millis(20)).await;
        assert!(matches!(short, Err(Error::Busy(2))), "{short:?}");
        let waiting = gate.idle(Duration::from_secs(30));
        let ending = async {
            drop(one);
            tokio::task::yield_now().await;
            drop(two);
        };
        let (waited, ()) = tokio::join!(waiting, ending);
        waited.unwrap();
    }
}
