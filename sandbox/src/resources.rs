//! How large a pod's VM is, and what its cgroup on the host is given.
//!
//! Limits are the containers', from their OCI resources; what the whole pod may use comes with the sandbox, by the
//! annotations that containerd and CRI-O make for it. From these follow the number of vCPUs on line and the guest's
//! memory. What a container gets is set in the guest, by the agent.

use std::collections::{BTreeSet, HashMap};

use oci_spec::runtime::LinuxResources;

use crate::cgroup::HostLimits;
use crate::config::{Configuration, MAX_MEMORY_MIB, MAX_VCPUS, Templates};
use crate::snapshot::Machine;

mod annotations;
mod demand;
#[cfg(test)]
mod tests;

pub use demand::Demand;
use demand::{list, parse_list};

/// Most vCPUs a VM can grow to unless the configuration says otherwise: each costs the guest memory, on line or not.
const DEFAULT_MAX_VCPUS: u8 = 8;

/// Memory a running guest gets and gives back in multiples of so many MiB, the unit of Linux' virtio-mem driver.
const STEP_MIB: u32 = 4;

/// The guest's books about its memory take a part of it: one page structure for each page, and reserves.
const BOOKS: u64 = 32;

/// Memory beside the guest's that the pod's cgroup allows for: shim, VMM, page tables and file cache.
const HOST_OVERHEAD_MIB: u64 = 128;

/// Processor time in thousandths that the pod's cgroup allows for beside the containers'.
const HOST_OVERHEAD_MILLI: u64 = 100;

/// Templates smaller than the configuration's size have a multiple of so many MiB.
const TEMPLATE_STEP_MIB: u32 = 64;

const MIB: u64 = 1 << 20;

/// `cpu.shares` of one processor's request.
const SHARES: u64 = 1024;

/// Size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// vCPUs on line.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// The size of one pod's VM, as containers come and go.
#[derive(Clone, Debug)]
pub struct Sizing {
    default: Size,
    overhead_mib: u32,
    boot: Size,
    max: Size,
    /// What the sandbox says the pod needs; void once a container is updated, as it is not brought up to date.
    pod: Option<Demand>,
    containers: HashMap<String, Demand>,
}

/// Processors and memory of the host, which bound what a VM is given.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Processors.
    pub processors: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl Host {
    /// This host.
    #[must_use]
    pub fn this() -> Self {
        let pages = |name| {
            nix::unistd::sysconf(name)
                .ok()
                .flatten()
                .and_then(|value| u64::try_from(value).ok())
        };
        use nix::unistd::SysconfVar as Var;
        let memory = pages(Var::_PHYS_PAGES)
            .unwrap_or(0)
            .saturating_mul(pages(Var::PAGE_SIZE).unwrap_or(4096));
        // Those of the host: the pod may be moved to other processors than it starts on.
        let processors = pages(Var::_NPROCESSORS_ONLN).unwrap_or(1);
        Self {
            processors: u32::try_from(processors).unwrap_or(1),
            memory_mib: u32::try_from(memory / MIB).unwrap_or(MAX_MEMORY_MIB),
        }
    }
}

impl Sizing {
    /// The size to start with; `pod` is what the sandbox, or the only container, asks for.
    #[must_use]
    pub fn new(config: &Configuration, host: Host, pod: Option<Demand>) -> Self {
        let default = Size {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
        };
        let processors = u8::try_from(host.processors).unwrap_or(MAX_VCPUS);
        let max_vcpus = config
            .max_vcpus
            .unwrap_or(processors.min(DEFAULT_MAX_VCPUS))
            .clamp(default.vcpus, MAX_VCPUS);
        let max_memory = config
            .max_memory_mib
            .unwrap_or(host.memory_mib)
            .clamp(default.memory_mib, MAX_MEMORY_MIB.max(default.memory_mib));
        let mut sizing = Self {
            default,
            overhead_mib: config.overhead_memory_mib,
            boot: default,
            max: Size {
                vcpus: max_vcpus,
                memory_mib: max_memory,
            },
            pod,
            containers: HashMap::new(),
        };
        // A pod that asks for more processors from the start gets them, if the host has them.
        if config.max_vcpus.is_none()
            && let Some(wanted) = sizing.pod.as_ref().and_then(Demand::milli)
        {
            let wanted = u8::try_from(wanted.div_ceil(1000)).unwrap_or(MAX_VCPUS);
            sizing.max.vcpus = max_vcpus.max(wanted.min(processors).min(MAX_VCPUS));
        }
        sizing.boot = Size {
            vcpus: sizing.wanted_vcpus(),
            memory_mib: sizing.needed_memory(),
        };
        if config.templates != Templates::Off {
            sizing.boot = sizing.base();
        }
        sizing
    }

    /// Of a VM that goes on from a snapshot.
    #[must_use]
    pub fn continued(mut self, machine: &Machine) -> Self {
        self.boot = Size {
            vcpus: machine.boot_vcpus,
            memory_mib: machine.memory_mib,
        };
        self.max = Size {
            vcpus: machine.max_vcpus,
            memory_mib: machine.memory_mib.saturating_add(machine.hotplug_mib),
        };
        self
    }

    /// The size of the template for a VM that is to start with this one: few sizes serve many, and the VM grows by the
    /// rest.
    fn base(&self) -> Size {
        let Size { vcpus, memory_mib } = self.boot;
        let step = memory_mib.next_multiple_of(TEMPLATE_STEP_MIB);
        Size {
            vcpus: vcpus.min(self.default.vcpus),
            memory_mib: step.min(self.default.memory_mib),
        }
    }

    /// The size the VM starts with.
    #[must_use]
    pub fn boot(&self) -> Size {
        self.boot
    }

    /// Most vCPUs.
    #[must_use]
    pub fn max_vcpus(&self) -> u8 {
        self.max.vcpus
    }

    /// Memory in MiB by which the guest can grow, a multiple of 128.
    #[must_use]
    pub fn hotplug_mib(&self) -> u32 {
        (self.max.memory_mib - self.boot.memory_mib) / 128 * 128
    }

    /// A container comes.
    pub fn add(&mut self, id: &str, demand: Demand) {
        self.containers.insert(id.to_owned(), demand);
    }

    /// A container goes.
    pub fn remove(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// Whether no container is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    /// Takes back the update of a container.
    pub fn restore(&mut self, id: &str, before: &Self) {
        if let Some(demand) = before.containers.get(id)
            && self.containers.contains_key(id)
        {
            self.containers.insert(id.to_owned(), demand.clone());
            self.pod.clone_from(&before.pod);
        }
    }

    /// A container's limits change.
    pub fn update(&mut self, id: &str, resources: &LinuxResources) {
        if let Some(demand) = self.containers.get_mut(id) {
            demand.update(resources);
            self.pod = None;
        }
    }

    /// The pod's own limits change.
    pub fn update_pod(&mut self, resources: &LinuxResources) {
        self.pod.get_or_insert_default().update(resources);
    }

    /// The size the VM should have now. Memory is at least what it started with.
    #[must_use]
    pub fn wanted(&self) -> Size {
        Size {
            vcpus: self.wanted_vcpus(),
            memory_mib: self.wanted_memory(),
        }
    }

    fn wanted_vcpus(&self) -> u8 {
        let pod = self.pod.as_ref().and_then(Demand::milli);
        let default = u64::from(self.default.vcpus) * 1000;
        let mut limited = 0u64;
        let mut unlimited: Option<u64> = None;
        let mut requested = 0u64;
        for demand in self.containers.values() {
            match demand.milli() {
                Some(milli) => limited = limited.saturating_add(milli),
                None => {
                    let cpus = demand.cpus.as_ref().map_or(0, BTreeSet::len) as u64;
                    let least = match cpus {
                        // The host's shared pool says nothing about this pod.
                        0 => default,
                        cpus if cpus > self.max.vcpus.into() => default,
                        cpus => cpus * 1000,
                    };
                    unlimited = Some(unlimited.unwrap_or(0).max(least));
                    requested += demand.shares.unwrap_or(0).min(262_144) * 1000 / SHARES;
                }
            }
        }
        // In a pod with a limit the containers without one share it.
        let unlimited = match (unlimited, pod) {
            (Some(least), None) => least.max(requested),
            _ => 0,
        };
        let idle = if self.containers.is_empty() { default } else { 0 };
        let milli = limited.saturating_add(unlimited).max(pod.unwrap_or(idle));
        let count = u8::try_from(milli.div_ceil(1000)).unwrap_or(u8::MAX);
        count.clamp(1, self.max.vcpus)
    }

    fn needed_memory(&self) -> u32 {
        let pod = self
            .pod
            .as_ref()
            .and_then(|pod| Some(pod.memory?.saturating_add(pod.huge_bytes())));
        let mut limited = 0u64;
        let mut unlimited = false;
        for demand in self.containers.values() {
            match demand.memory {
                Some(bytes) => limited = limited.saturating_add(bytes),
                None => unlimited = true,
            }
            limited = limited.saturating_add(demand.huge_bytes());
        }
        let with_overhead = |bytes: u64| {
            let mib = bytes.div_ceil(MIB);
            mib.saturating_add(mib / BOOKS)
                .saturating_add(self.overhead_mib.into())
        };
        let mut mib = 0;
        if limited > 0 {
            mib = with_overhead(limited);
        }
        match pod {
            Some(bytes) => mib = mib.max(with_overhead(bytes)),
            None if unlimited && limited > 0 => mib = mib.saturating_add(self.default.memory_mib.into()),
            None if unlimited || self.containers.is_empty() => mib = self.default.memory_mib.into(),
            None => {}
        }
        let mib = u32::try_from(mib).unwrap_or(u32::MAX);
        mib.clamp(crate::config::MIN_MEMORY_MIB, self.max.memory_mib)
    }

    /// What of it can be reached from the size at the start.
    fn wanted_memory(&self) -> u32 {
        let mib = self.needed_memory();
        if mib <= self.boot.memory_mib {
            // All that was added can go.
            return self.boot.memory_mib;
        }
        let added = (mib - self.boot.memory_mib).next_multiple_of(STEP_MIB);
        self.boot.memory_mib + added.min(self.hotplug_mib())
    }

    /// What the pod's cgroup is given when the guest has `added_mib` MiB more than at its start.
    #[must_use]
    pub fn host_limits(&self, added_mib: u32) -> HostLimits {
        let guest = u64::from(self.boot.memory_mib) + u64::from(added_mib);
        let all = || self.containers.values();
        // Each limit, or none if one container has none.
        let total = all()
            .map(Demand::milli)
            .try_fold(0u64, |sum, milli| Some(sum.saturating_add(milli?)))
            .filter(|milli| *milli > 0);
        let pod = self.pod.as_ref().and_then(Demand::milli);
        let milli = match (total, pod) {
            (Some(total), Some(pod)) => Some(total.max(pod)),
            (total, pod) => total.or(pod),
        };
        let shares = all()
            .filter_map(|demand| demand.shares)
            .fold(0u64, |sum, shares| sum.saturating_add(shares));
        // Files that the pod writes into a file system in the host's memory count as well: without a limit of its
        // memory a pod may fill it as far as the host lets it.
        let pod_is_limited = self.pod.as_ref().is_some_and(|pod| pod.memory.is_some());
        let is_limited =
            pod_is_limited || (!self.containers.is_empty() && all().all(|demand| demand.memory.is_some()));
        HostLimits {
            memory_max: is_limited.then_some((guest + guest / BOOKS + HOST_OVERHEAD_MIB) * MIB),
            cpu_milli: milli.map(|milli| milli.saturating_add(HOST_OVERHEAD_MILLI)),
            cpu_shares: Some(shares).filter(|shares| *shares > 0),
            cpus: self.union().map(list),
            mems: self.union_of_nodes(),
            io_weight: all().filter_map(|demand| demand.io_weight).max(),
        }
    }

    /// Processors of the host that the containers may use; `None` if one may use all.
    fn union(&self) -> Option<BTreeSet<u16>> {
        let sets: Option<Vec<_>> = self
            .containers
            .values()
            .map(|demand| demand.cpus.as_ref())
            .collect();
        let union: BTreeSet<u16> = sets?.into_iter().flatten().copied().collect();
        Some(union).filter(|union| !union.is_empty())
    }

    fn union_of_nodes(&self) -> Option<String> {
        let sets: Option<Vec<_>> = self
            .containers
            .values()
            .map(|demand| demand.mems.as_deref().and_then(parse_list))
            .collect();
        let union: BTreeSet<u16> = sets?.into_iter().flatten().collect();
        (!union.is_empty()).then(|| list(union))
    }

    /// Processors of the guest for a container that names some of the host: the n-th of all that the pod names is
    /// the guest's n-th. All of them, if the guest has fewer.
    #[must_use]
    pub fn guest_cpus(&self, id: &str) -> Option<String> {
        let own = self.containers.get(id)?.cpus.as_ref()?;
        let vcpus = usize::from(self.wanted_vcpus());
        let union: BTreeSet<u16> = self
            .containers
            .values()
            .filter_map(|demand| demand.cpus.as_ref())
            .flatten()
            .copied()
            .collect();
        if union.len() > vcpus {
            return Some(list(0..vcpus));
        }
        let places = union.iter().zip(0..).filter(|(cpu, _)| own.contains(cpu));
        Some(list(places.map(|(_, place): (_, usize)| place)))
    }

    /// The containers that name processors.
    #[must_use]
    pub fn pinned(&self) -> Vec<String> {
        let pinned = self.containers.iter().filter(|(_, demand)| demand.cpus.is_some());
        pinned.map(|(id, _)| id.clone()).collect()
    }
}
