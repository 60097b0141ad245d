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
    /// Number of the last subscriber.
    subscriber: u64,
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

    /// Becomes the one subscriber. The one before may belong to a connection that is no more, which nobody tells it.
    pub fn subscribe(&self) -> Subscription {
        let mut queue = self.queue();
        queue.subscriber += 1;
        // None of those that wait takes the notice of an event from this one.
        self.0.added.notify_waiters();
        Subscription {
            events: self.clone(),
            number: queue.subscriber,
        }
    }
}

/// The right to take events, until another one has it.
#[derive(Debug)]
pub struct Subscription {
    events: Events,
    number: u64,
}

impl Subscription {
    /// The oldest event, left in the queue until [`Subscription::sent`]: one that could not be sent is there for
    /// the next subscriber. `None` once there is a later one.
    pub async fn next(&self) -> Option<Event> {
        loop {
            let added = self.events.0.added.notified();
            {
                let queue = self.events.queue();
                if queue.subscriber != self.number {
                    return None;
                }
                if let Some(event) = queue.events.front() {
                    return Some(event.clone());
                }
            }
            added.await;
        }
    }

    /// Drops the event that [`Subscription::next`] returned, unless a later subscriber has got it as well.
    pub fn sent(&self) {
        let mut queue = self.events.queue();
        if queue.subscriber == self.number {
            queue.events.pop_front();
        }
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
        let first = events.subscribe();
        assert_eq!(first.next().await, Some(exited(1)));
        first.sent();
        assert_eq!(first.next().await, Some(exited(2)));
        let second = events.subscribe();
        // Too late: it may not have arrived.
        first.sent();
        assert_eq!(first.next().await, None);
        assert_eq!(second.next().await, Some(exited(2)));
        second.sent();
        let (event, ()) = tokio::join!(second.next(), async { events.push(exited(3)) });
        assert_eq!(event, Some(exited(3)));
        second.sent();
        // One that waits makes room for the next, which hears of what comes.
        let third = async {
            let third = events.subscribe();
            events.push(exited(4));
            third.next().await
        };
        assert_eq!(tokio::join!(second.next(), third), (None, Some(exited(4))));
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
        let subscription = events.subscribe();
        for expected in [oom("a"), oom("b"), exited(1)] {
            assert_eq!(subscription.next().await, Some(expected));
            subscription.sent();
        }
        assert!(events.queue().events.is_empty());
    }
}
