//! What one container, or the pod, asks for in its OCI resources.

use std::collections::{BTreeSet, HashMap};

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};

use super::annotations;

/// What a container, or the pod, asks for. `None`: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    pub(super) quota: Option<u64>,
    pub(super) period: Option<u64>,
    /// `cpu.shares`.
    pub(super) shares: Option<u64>,
    /// Processors of the host.
    pub(super) cpus: Option<BTreeSet<u16>>,
    /// Memory nodes of the host, as given.
    pub(super) mems: Option<String>,
    /// Bytes.
    pub(super) memory: Option<u64>,
    /// Bytes by page size.
    pub(super) huge_pages: HashMap<String, u64>,
    /// `blkio.weight`.
    pub(super) io_weight: Option<u16>,
}

impl Demand {
    /// What a container's specification asks for.
    #[must_use]
    pub fn of_container(spec: &Spec) -> Self {
        let mut demand = Self::default();
        if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
            demand.update(resources);
        }
        demand
    }

    /// What the annotations of a sandbox ask for; `None`: nothing is said there.
    #[must_use]
    pub fn of_sandbox(spec: &Spec) -> Option<Self> {
        spec.annotations().as_ref().and_then(annotations::read)
    }

    /// Takes over what is given, as an update of a container does. Zero is how Go writes an absent number.
    pub fn update(&mut self, resources: &LinuxResources) {
        if let Some(cpu) = resources.cpu() {
            self.update_cpu(cpu);
        }
        if let Some(limit) = resources.memory().as_ref().and_then(LinuxMemory::limit) {
            set(&mut self.memory, limit);
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            let bytes = u64::try_from(limit.limit()).unwrap_or(0);
            self.huge_pages.insert(limit.page_size().clone(), bytes);
        }
        let weight = resources.block_io().as_ref().and_then(|io| io.weight());
        if let Some(weight) = weight.filter(|weight| *weight > 0) {
            self.io_weight = Some(weight);
        }
    }

    fn update_cpu(&mut self, cpu: &LinuxCpu) {
        if let Some(quota) = cpu.quota() {
            set(&mut self.quota, quota);
        }
        if let Some(period @ 1..) = cpu.period() {
            self.period = Some(period);
        }
        if let Some(shares @ 1..) = cpu.shares() {
            self.shares = Some(shares);
        }
        if let Some(cpus) = cpu.cpus().as_deref().filter(|list| !list.is_empty()) {
            self.cpus = parse_list(cpus);
        }
        if let Some(mems) = cpu.mems().as_deref().filter(|list| !list.is_empty()) {
            self.mems = Some(mems.to_owned());
        }
    }

    /// Limit of processor time in thousandths of a processor.
    pub(super) fn milli(&self) -> Option<u64> {
        let period = self.period.unwrap_or(100_000).max(1);
        self.quota
            .map(|quota| quota.saturating_mul(1000).div_ceil(period).max(1))
    }

    /// Bytes that count against the guest's memory.
    pub(super) fn huge_bytes(&self) -> u64 {
        self.huge_pages
            .values()
            .fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// A limit as OCI writes it: below zero there is none, zero says nothing.
pub(super) fn set(limit: &mut Option<u64>, value: i64) {
    match u64::try_from(value) {
        Ok(0) => {}
        Ok(value) => *limit = Some(value),
        Err(_) => *limit = None,
    }
}

/// Parses a list like `0-3,8`; `None` if it is not one.
pub(super) fn parse_list(text: &str) -> Option<BTreeSet<u16>> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

pub(super) fn list(set: impl IntoIterator<Item = impl ToString>) -> String {
    let numbers: Vec<String> = set.into_iter().map(|number| number.to_string()).collect();
    numbers.join(",")
}
