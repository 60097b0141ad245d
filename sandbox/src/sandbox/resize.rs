//! The size of the running VM follows its containers.

use bulkhead_protocol::agent::{SetProcessorsRequest, UpdateContainerRequest};
use bulkhead_protocol::control::Request;
use oci_spec::runtime::{LinuxCpu, LinuxResources};

use super::*;
use crate::error::chain;
use crate::resources::Sizing;

/// What the VM and the guest have been asked for.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// vCPUs that exist; 0: those of the boot.
    vcpus: u8,
    /// vCPUs on line.
    online: u8,
    /// Memory beside that of the boot in MiB.
    added_mib: u32,
    /// Memory beside that of the boot that it has room for on the host, in MiB.
    granted_mib: u32,
    /// Processors of containers that name some.
    pins: HashMap<String, String>,
}

impl Applied {
    /// What a VM of a snapshot had been asked for.
    pub(super) fn of(machine: &crate::snapshot::Machine) -> Self {
        Self {
            vcpus: machine.vcpus,
            online: machine.online,
            added_mib: machine.added_mib,
            granted_mib: machine.added_mib,
            pins: HashMap::new(),
        }
    }

    /// vCPUs that exist, and those on line, of a VM that booted with `boot`.
    pub(super) fn vcpus(&self, boot: u8) -> (u8, u8) {
        match self.vcpus {
            0 => (boot, boot),
            vcpus => (vcpus, self.online),
        }
    }

    /// Memory beside that of the boot in MiB.
    pub(super) fn added_mib(&self) -> u32 {
        self.added_mib
    }

    /// The room that is left to a VM that says it has `told_mib` MiB more than at its boot. Its word counts only
    /// downwards: a VMM that was taken over does not give itself memory of the host.
    fn room(&mut self, told_mib: u32) -> u32 {
        self.granted_mib = self.added_mib.max(told_mib.min(self.granted_mib));
        self.granted_mib
    }
}

/// Whether the VM may get smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resize {
    /// Before something comes that needs room.
    Grow,
    /// After something has come or gone.
    Fit,
}

impl Sandbox {
    /// Brings the VM, the guest's processors and the pod's cgroup to the size the containers ask for. Growing waits
    /// for the guest; what it gives back comes when it can.
    pub(super) async fn adjust(&self, guest: &Guest, how: Resize) -> Result<(), Error> {
        let mut applied = self.0.applied.lock().await;
        let (boot, wanted) = {
            let state = self.lock();
            (state.sizing.boot(), state.sizing.wanted())
        };
        (applied.vcpus, applied.online) = applied.vcpus(boot.vcpus);
        let added = wanted.memory_mib.saturating_sub(boot.memory_mib);
        if added > applied.added_mib || (how == Resize::Fit && added < applied.added_mib) {
            self.set_memory(guest, &mut applied, added).await?;
        }
        if wanted.vcpus > applied.online || (how == Resize::Fit && wanted.vcpus < applied.online) {
            set_processors(guest, &mut applied, wanted.vcpus).await?;
        }
        if how == Resize::Fit {
            self.limit_cgroup(applied.room(guest.vm.added_memory())).await;
            self.pin(guest, &mut applied).await;
        }
        Ok(())
    }

    async fn set_memory(&self, guest: &Guest, applied: &mut Applied, mib: u32) -> Result<(), Error> {
        let grows = mib > applied.added_mib;
        if grows {
            // Room on the host first.
            applied.granted_mib = applied.granted_mib.max(mib);
            self.limit_cgroup(applied.granted_mib).await;
        }
        log::debug!(
            "sandbox {}: memory {} -> {mib} MiB added",
            self.0.id,
            applied.added_mib
        );
        guest.vm.ask(Request::SetMemory { mib }, Vec::new()).await?;
        applied.added_mib = mib;
        if grows {
            let limit = Duration::from_secs(self.0.config.request_timeout_s.into());
            if !guest.vm.wait_for_memory(mib, limit).await {
                return Err(Error::Timeout {
                    phase: "growth of the guest's memory",
                    limit,
                    console: guest.vm.console_tail().await,
                });
            }
        }
        Ok(())
    }

    /// Sets the limits of the pod's cgroup for a guest with `added_mib` MiB more than at its boot.
    ///
    /// On a thread of its own: the kernel takes memory back before it answers.
    async fn limit_cgroup(&self, added_mib: u32) {
        if let Some(cgroup) = self.0.cgroup.clone() {
            let limits = self.lock().sizing.host_limits(added_mib);
            if let Err(error) = on_thread("limits of the pod's cgroup", move || cgroup.limit(&limits)).await {
                log::warn!("{}", chain(&error));
            }
        }
    }

    /// Lowers the limit of the pod's cgroup as the guest gives memory back.
    pub(super) async fn follow_memory(self, mut memory: watch::Receiver<u32>) {
        while memory.changed().await.is_ok() {
            let has = *memory.borrow_and_update();
            let mut applied = self.0.applied.lock().await;
            if has >= applied.added_mib && !self.lock().containers.is_empty() {
                self.limit_cgroup(applied.room(has)).await;
            }
        }
    }

    /// Tells the guest which of its processors stand for those a container names, where that has changed.
    async fn pin(&self, guest: &Guest, applied: &mut Applied) {
        let pins: Vec<(String, String)> = {
            let sizing = &self.lock().sizing;
            let pins = sizing.pinned().into_iter();
            pins.filter_map(|id| Some((sizing.guest_cpus(&id)?, id)))
                .map(|(cpus, id)| (id, cpus))
                .collect()
        };
        applied
            .pins
            .retain(|id, _| pins.iter().any(|(other, _)| other == id));
        for (id, cpus) in pins {
            if applied.pins.get(&id) == Some(&cpus) {
                continue;
            }
            let json = serde_json::json!({ "cpu": { "cpus": cpus } });
            let request = UpdateContainerRequest {
                container_id: self.guest_id(&id),
                resources_json: json.to_string().into_bytes(),
                ..Default::default()
            };
            match guest.agent.update_container(&request).await {
                Ok(_) => drop(applied.pins.insert(id, cpus)),
                // It is not there yet, or no longer.
                Err(error) => log::debug!("{}", chain(&error)),
            }
        }
    }

    /// A container has gone, or was not made.
    pub(super) async fn shrink(&self, id: &str) {
        let (changed, is_empty) = {
            let mut state = self.lock();
            let before = state.sizing.wanted();
            state.sizing.remove(id);
            (before != state.sizing.wanted(), state.sizing.is_empty())
        };
        let guest = match &*self.0.boot.borrow() {
            Boot::Ready(guest) if guest.vm.end().is_none() => guest.clone(),
            _ => return,
        };
        if self.is_stopping() {
            return;
        }
        // With the last container most VMs end: nothing is asked of them. A pod goes on, without its containers' limits.
        if !changed && is_empty {
            let room = self.0.applied.lock().await.room(guest.vm.added_memory());
            self.limit_cgroup(room).await;
            return;
        }
        if let Err(error) = self.adjust(&guest, Resize::Fit).await {
            log::warn!("sandbox {}: the VM keeps its size: {}", self.0.id, chain(&error));
        }
    }

    /// Changes a container's limits; `resources_json` is an OCI `LinuxResources` object. The VM grows before the
    /// container may use more, and shrinks after it may not. The sandbox container's are the pod's. Goes on when the caller
    /// stops waiting.
    ///
    /// # Errors
    /// [`Error::State`], or the agent's reason; the container keeps its limits then.
    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), Error> {
        let (id, json) = (id.to_owned(), resources_json.to_owned());
        self.to_the_end(|sandbox: Self| async move { sandbox.update_to_the_end(&id, &json).await })
            .await
    }

    async fn update_to_the_end(&self, id: &str, resources_json: &[u8]) -> Result<(), Error> {
        let is_sandbox = self.with(id, |record| {
            record.machine.check_update()?;
            Ok(record.is_sandbox)
        })?;
        let mut resources: LinuxResources =
            serde_json::from_slice(resources_json).map_err(crate::spec::SpecError::Resources)?;
        let guest = self.guest().await?;
        if is_sandbox {
            self.lock().sizing.update_pod(&resources);
            return self.adjust(&guest, Resize::Fit).await;
        }
        let before = {
            let sizing = &mut self.lock().sizing;
            let before = sizing.clone();
            sizing.update(id, &resources);
            before
        };
        let step = async |step| fault::reach(step).await.map_err(|error| Error::Step(step, error));
        let result = async {
            step(Step::UpdateGrown).await?;
            self.adjust(&guest, Resize::Grow).await?;
            translate(&mut resources, &self.lock().sizing, id);
            let request = UpdateContainerRequest {
                container_id: self.guest_id(id),
                resources_json: serde_json::to_vec(&resources).map_err(crate::spec::SpecError::Encode)?,
                ..Default::default()
            };
            step(Step::GuestUpdated).await?;
            guest.agent.update_container(&request).await
        }
        .await;
        if result.is_err() {
            self.lock().sizing.restore(id, &before);
        }
        let fitted = match step(Step::UpdateFitted).await {
            Ok(()) => self.adjust(&guest, Resize::Fit).await,
            Err(error) => Err(error),
        };
        result?;
        fitted
    }
}

async fn set_processors(guest: &Guest, applied: &mut Applied, count: u8) -> Result<(), Error> {
    if count > applied.vcpus {
        guest.vm.ask(Request::AddVcpus { count }, Vec::new()).await?;
        applied.vcpus = count;
    }
    let request = SetProcessorsRequest {
        online: count.into(),
        ..SetProcessorsRequest::default()
    };
    let answer = guest.agent.set_processors(&request).await?;
    applied.online = u8::try_from(answer.online).unwrap_or(u8::MAX);
    Ok(())
}

/// Replaces what names processors, memory nodes and devices of the host: the guest has others.
pub(super) fn translate(resources: &mut LinuxResources, sizing: &Sizing, id: &str) {
    if let Some(cpu) = resources.cpu().clone() {
        let named = cpu.cpus().as_deref().is_some_and(|cpus| !cpus.is_empty());
        let mut cpu: LinuxCpu = cpu;
        cpu.set_cpus(sizing.guest_cpus(id).filter(|_| named));
        cpu.set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut io) = resources.block_io().clone() {
        io.set_weight_device(None);
        io.set_throttle_read_bps_device(None);
        io.set_throttle_write_bps_device(None);
        io.set_throttle_read_iops_device(None);
        io.set_throttle_write_iops_device(None);
        resources.set_block_io(Some(io));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_vm_has_room_for_what_it_was_given_and_no_more() {
        let mut applied = Applied {
            added_mib: 512,
            granted_mib: 512,
            ..Applied::default()
        };
        assert_eq!(applied.room(0), 512);
        assert_eq!(applied.room(u32::MAX), 512);
        // It is to give some back, and does so in steps.
        applied.added_mib = 128;
        assert_eq!(
            [400, 512, 130, 0, 4096].map(|told| applied.room(told)),
            [400, 400, 130, 128, 128]
        );
    }

    #[test]
    fn what_names_the_host_is_translated() {
        let config = Configuration {
            max_vcpus: Some(8),
            ..Configuration::default()
        };
        let host = Host {
            processors: 8,
            memory_mib: 8192,
        };
        let mut sizing = Sizing::new(&config, host, None);
        let read = |value: Value| -> LinuxResources { serde_json::from_value(value).unwrap() };
        let mut resources = read(json!({
            "cpu": {"shares": 5, "cpus": "4-5", "mems": "1"},
            "blockIO": {"weight": 20, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]},
        }));
        let mut demand = Demand::default();
        demand.update(&resources);
        sizing.add("a", demand);
        translate(&mut resources, &sizing, "a");
        let expected = read(json!({"cpu": {"shares": 5, "cpus": "0,1"}, "blockIO": {"weight": 20}}));
        assert_eq!(resources, expected);
        // An update that says nothing about processors leaves them.
        let mut update = read(json!({"cpu": {"quota": 7}}));
        translate(&mut update, &sizing, "a");
        assert_eq!(update, read(json!({"cpu": {"quota": 7}})));
    }

    /// JSON of limits with whatever names the host's processors, nodes and devices.
    fn any_resources() -> impl Strategy<Value = Value> {
        use proptest::option::of;
        let device = (0i64..300, 0i64..300, any::<u64>())
            .prop_map(|(major, minor, rate)| json!({"major": major, "minor": minor, "rate": rate}));
        let devices = proptest::collection::vec(device, 0..3);
        let cpu = (
            of(any::<u64>()),
            of(any::<i64>()),
            of(any::<u64>()),
            of("([0-9]{1,2}(-[0-9]{1,2})?(,[0-9])?)?"),
            of("[0-3](-[0-3])?"),
        );
        let io = (of(10u16..1000), of(devices.clone()), of(devices));
        let memory = (of(any::<i64>()), of(any::<i64>()));
        (of(cpu), of(io), of(memory), of(any::<i64>())).prop_map(|(cpu, io, memory, pids)| {
            let mut value = json!({"unified": {"memory.high": "1"}});
            if let Some((shares, quota, period, cpus, mems)) = cpu {
                value["cpu"] =
                    json!({"shares": shares, "quota": quota, "period": period, "cpus": cpus, "mems": mems});
            }
            if let Some((weight, read, write)) = io {
                value["blockIO"] = json!({"weight": weight, "throttleReadBpsDevice": read,
                    "throttleWriteIOPSDevice": write, "weightDevice": []});
            }
            if let Some((limit, swap)) = memory {
                value["memory"] = json!({"limit": limit, "swap": swap});
            }
            if let Some(limit) = pids {
                value["pids"] = json!({"limit": limit});
            }
            value
        })
    }

    proptest! {
        /// Nothing of the host's numbers is left, processors that are named are some the guest can have, and all else is
        /// as it was.
        #[test]
        fn what_the_guest_gets_names_nothing_of_the_host(value in any_resources(), others in 0u8..4) {
            let config = Configuration { max_vcpus: Some(6), ..Configuration::default() };
            let mut sizing = Sizing::new(&config, Host { processors: 64, memory_mib: 8192 }, None);
            for number in 0..others {
                let pinned = serde_json::from_value(json!({"cpu": {"cpus": format!("{number}-{}", number + 3)}})).unwrap();
                let mut demand = Demand::default();
                demand.update(&pinned);
                sizing.add(&number.to_string(), demand);
            }
            let given: LinuxResources = serde_json::from_value(value).unwrap();
            let mut demand = Demand::default();
            demand.update(&given);
            sizing.add("a", demand);
            let mut translated = given.clone();
            translate(&mut translated, &sizing, "a");
            let once = translated.clone();
            if let Some(cpu) = translated.cpu() {
                prop_assert_eq!(cpu.mems(), &None);
                let named = given.cpu().as_ref().and_then(|cpu| cpu.cpus().clone()).filter(|cpus| !cpus.is_empty());
                for processor in cpu.cpus().iter().flat_map(|cpus| cpus.split(',')) {
                    prop_assert!(named.is_some());
                    prop_assert!(processor.parse::<u8>().unwrap() < 6, "{}", processor);
                }
            }
            if let Some(io) = translated.block_io() {
                let lists = serde_json::to_value(io).unwrap();
                prop_assert!(lists.as_object().unwrap().keys().all(|key| !key.ends_with("Device")), "{}", lists);
            }
            // Put back what may differ: the rest must be equal.
            if let (Some(cpu), Some(before)) = (translated.cpu().clone(), given.cpu()) {
                let mut cpu = cpu;
                cpu.set_cpus(before.cpus().clone());
                cpu.set_mems(before.mems().clone());
                translated.set_cpu(Some(cpu));
            }
            let weight = |resources: &LinuxResources| resources.block_io().as_ref().and_then(|io| io.weight());
            prop_assert_eq!(weight(&translated), weight(&given));
            translated.set_block_io(given.block_io().clone());
            prop_assert_eq!(&translated, &given);
            // The agent reads what is written.
            let bytes = serde_json::to_vec(&once).unwrap();
            prop_assert_eq!(serde_json::from_slice::<LinuxResources>(&bytes).unwrap(), once);
        }
    }
}
