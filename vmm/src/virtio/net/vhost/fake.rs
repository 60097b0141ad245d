//! A stand-in for the kernel's device, which writes down what it is asked.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use super::*;

/// What a stand-in was asked, and what it answers.
#[derive(Clone, Debug, Default)]
pub struct Fake(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    operations: Vec<Operation>,
    bases: [u16; 2],
    lacking: u64,
    refused: Option<&'static str>,
}

impl Fake {
    /// One that lacks features.
    pub fn without(features: u64) -> Self {
        let fake = Self::default();
        fake.0.lock().unwrap().lacking = features;
        fake
    }

    /// The device it stands in for, which nobody owns yet.
    pub fn device(&self) -> Vhost {
        Vhost {
            file: std::fs::File::open("/dev/null").unwrap().into(),
            errors: EventFd::new(EFD_NONBLOCK).unwrap(),
            taken: false,
            fake: Some(self.clone()),
        }
    }

    /// The operations since the last time.
    pub fn take_operations(&self) -> Vec<Operation> {
        std::mem::take(&mut self.0.lock().unwrap().operations)
    }

    /// Where rings are.
    pub fn set_bases(&self, bases: [u16; 2]) {
        self.0.lock().unwrap().bases = bases;
    }

    /// Refuses the operations with these words, or none.
    pub fn refuse(&self, what: Option<&'static str>) {
        self.0.lock().unwrap().refused = what;
    }

    pub(super) fn perform(&self, operation: &Operation) -> Result<u64, VhostError> {
        let mut state = self.0.lock().unwrap();
        state.operations.push(operation.clone());
        if state.refused == Some(operation.what()) {
            return Err(VhostError::Refused {
                what: operation.what(),
                source: io::Error::from_raw_os_error(libc::EBUSY),
            });
        }
        Ok(match operation {
            Operation::GetFeatures => !state.lacking,
            Operation::GetBase(index) => state.bases[*index as usize].into(),
            _ => 0,
        })
    }
}
