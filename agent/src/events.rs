//! Exits and out-of-memory kills on their way to the host.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent as proto;
use tokio::sync::Notify;

use crate::reaper::Exit;

/// Something the host must hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process ended.
    Exited {
        /// Container.
        container: String,
        /// Empty: the init process.
        exec: String,
        /// Process id in the guest.
        pid: u32,
        /// How and when.
        exit: Exit,
    },
    /// The kernel killed a process of the container for lack of memory.
    OutOfMemory {
        /// Container.
        container: String,
    },
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    subscribed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    added: Notify,
}

/// The queue of events. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Shared>);

impl Events {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. Of several out-of-memory events of a container that nobody has fetched one is kept: a
    /// container can cause them at will.
    pub fn push(&self, event: Event) {
        let mut queue = self.queue();
        if matches!(event, Event::OutOfMemory { .. }) && queue.events.contains(&event) {
            return;
        }
        queue.events.push_back(event);
        self.0.added.notify_one();
    }

    /// Becomes the one subscriber, or nothing if there is one.
    pub fn subscribe(&self) -> Option<Subscription> {
        let mut queue = self.queue();
        let free = !std::mem::replace(&mut queue.subscribed, true);
        free.then(|| Subscription(self.clone()))
    }
}

/// The right to take events; given back when dropped.
#[derive(Debug)]
pub struct Subscription(Events);

impl Subscription {
    /// The oldest event, left in the queue until [`Subscription::sent`]: one that could not be sent is there for
    /// the next subscriber.
    pub async fn next(&self) -> Event {
        loop {
            let added = self.0.0.added.notified();
            if let Some(event) = self.0.queue().events.front() {
                return event.clone();
            }
            added.await;
        }
    }

    /// Drops the event that [`Subscription::next`] returned.
    pub fn sent(&self) {
        self.0.queue().events.pop_front();
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.queue().subscribed = false;
    }
}

impl From<Event> for proto::Event {
    fn from(event: Event) -> Self {
        let mut message = proto::Event::new();
        match event {
            Event::Exited {
                container,
                exec,
                pid,
                exit,
            } => message.set_exited(proto::ProcessExited {
                container_id: container,
                exec_id: exec,
                pid,
                exit_status: exit.status,
                exited_at_ns: u64::try_from(exit.at.as_nanos()).unwrap_or(u64::MAX),
                ..Default::default()
            }),
            Event::OutOfMemory { container } => {
                message.set_oom(proto::OutOfMemory {
                    container_id: container,
                    ..Default::default()
                });
            }
        }
        message
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    fn exited(pid: u32) -> Event {
        let exit = Exit {
            status: 0,
            at: Duration::ZERO,
        };
        Event::Exited {
            container: "c".into(),
            exec: String::new(),
            pid,
            exit,
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn events_wait_for_the_subscriber_and_survive_a_failed_one() {
        let events = Events::default();
        events.push(exited(1));
        events.push(exited(2));
        {
            let subscription = events.subscribe().unwrap();
            assert!(events.subscribe().is_none());
            assert_eq!(subscription.next().await, exited(1));
            subscription.sent();
            assert_eq!(subscription.next().await, exited(2));
        }
        let subscription = events.subscribe().unwrap();
        assert_eq!(subscription.next().await, exited(2));
        subscription.sent();
        let (event, ()) = tokio::join!(subscription.next(), async { events.push(exited(3)) });
        assert_eq!(event, exited(3));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn out_of_memory_events_do_not_pile_up() {
        let events = Events::default();
        let oom = |id: &str| Event::OutOfMemory { container: id.into() };
        for _ in 0..1000 {
            events.push(oom("a"));
            events.push(oom("b"));
        }
        events.push(exited(1));
        let subscription = events.subscribe().unwrap();
        for expected in [oom("a"), oom("b"), exited(1)] {
            assert_eq!(subscription.next().await, expected);
            subscription.sent();
        }
        assert!(events.queue().events.is_empty());
    }
}
