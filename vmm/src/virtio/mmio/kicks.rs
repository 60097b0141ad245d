//! Who takes the driver's kicks.
//!
//! A kick is a write to a register, which leaves the guest and reaches the queue's eventfd through a vCPU's thread. KVM can
//! do that by itself, but to be told of a queue it waits for everybody who looks devices up: some 50 microseconds each,
//! while most queues of a pod are kicked a few times or never. So it is told when a queue has been kicked often, by the main
//! thread, and no place of the bus costs anything before there is a device that is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Kicks by way of a vCPU's thread, a few microseconds each, before KVM takes those of a queue.
pub const EXITS: u32 = 16;

/// Kicks of a device's queues, as long as KVM does not take them.
#[derive(Debug)]
pub struct Kicks {
    queues: Vec<Exits>,
    /// Told of a queue that is kicked often.
    busy: Option<Arc<EventFd>>,
}

#[derive(Debug, Default)]
struct Exits {
    count: AtomicU32,
    /// KVM has been told.
    handed_over: AtomicBool,
}

impl Kicks {
    /// Of so many queues; nobody is told of any.
    pub fn new(queues: usize) -> Self {
        Self {
            queues: (0..queues).map(|_| Exits::default()).collect(),
            busy: None,
        }
    }

    /// Has `busy` signalled when it is time for [`hand_over`](Self::hand_over).
    pub fn tell(&mut self, busy: Arc<EventFd>) {
        self.busy = Some(busy);
    }

    /// A queue was kicked by way of a vCPU's thread.
    pub fn count(&self, queue: usize) {
        let Some((exits, busy)) = self.queues.get(queue).zip(self.busy.as_ref()) else {
            return;
        };
        if exits.count.fetch_add(1, Ordering::Relaxed) + 1 == EXITS {
            // It can fail only if the counter is full: then it is readable.
            let _ = busy.write(1);
        }
    }

    /// Calls `register` for each queue that is kicked often, once.
    ///
    /// # Errors
    /// The first of `register`; such a queue is kicked as before, for good.
    pub fn hand_over<E>(&self, mut register: impl FnMut(usize) -> Result<(), E>) -> Result<(), E> {
        let mut result = Ok(());
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.count.load(Ordering::Relaxed) < EXITS || queue.handed_over.swap(true, Ordering::Relaxed)
            {
                continue;
            }
            let registered = register(index);
            if result.is_ok() {
                result = registered;
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn handed_over(kicks: &Kicks) -> Vec<usize> {
        let mut queues = Vec::new();
        let result: Result<(), ()> = kicks.hand_over(|queue| {
            queues.push(queue);
            Ok(())
        });
        result.unwrap();
        queues
    }

    #[test]
    fn a_queue_that_is_kicked_often_is_handed_over_once() {
        let busy = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut kicks = Kicks::new(3);
        kicks.tell(busy.clone());
        for _ in 1..EXITS {
            kicks.count(0);
            kicks.count(2);
        }
        kicks.count(3);
        assert!(busy.read().is_err());
        assert!(handed_over(&kicks).is_empty());
        kicks.count(2);
        assert_eq!(busy.read().unwrap(), 1);
        assert_eq!(handed_over(&kicks), [2]);
        // One that was under way.
        kicks.count(2);
        assert!(busy.read().is_err());
        kicks.count(0);
        assert_eq!(busy.read().unwrap(), 1);
        assert_eq!(handed_over(&kicks), [0]);
        assert!(handed_over(&kicks).is_empty());
    }

    #[test]
    fn a_queue_that_kvm_refuses_does_not_keep_others_back() {
        let mut kicks = Kicks::new(2);
        kicks.tell(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        for _ in 0..EXITS {
            kicks.count(0);
            kicks.count(1);
        }
        let mut queues = Vec::new();
        let result = kicks.hand_over(|queue| {
            queues.push(queue);
            if queue == 0 { Err("no") } else { Ok(()) }
        });
        assert_eq!((result, queues), (Err("no"), vec![0, 1]));
        assert!(handed_over(&kicks).is_empty());
    }
}
