//! From nothing to an agent that serves.

use bulkhead_protocol::agent::{HelloResponse, SetupSandboxRequest, ThawRequest, event};
use bulkhead_protocol::control::{self, BootTimes, Share, Start, VmConfig};
use bulkhead_protocol::ports;
use tokio::sync::mpsc;

use super::template::Origin;
use super::*;
use crate::agent::Events;
use crate::config::Wall;
use crate::error::chain;
use crate::jail::Jail;
use crate::journal::{Entry, Role};
use crate::vm::{Descriptors, VmError, VsockEvent, open_for_vm};

/// Tag of the shared tree's virtio-fs device.
const SHARE_TAG: &str = "bulkhead";

impl Sandbox {
    pub(super) async fn run_boot(self) {
        let mut stopping = self.0.stopping.subscribe();
        let result = tokio::select! {
            biased;
            result = self.boot() => result,
            () = super::create::is_set(&mut stopping) => Err(Error::Cancelled {
                id: self.0.id.clone(),
                phase: self.lock().boot_step.words(),
            }),
        };
        let state = match result {
            Ok(guest) => Boot::Ready(guest),
            Err(error) => {
                log::error!("sandbox {} did not start: {}", self.0.id, chain(&error));
                self.begin_stop();
                if let Some(vm) = self.vm_now() {
                    vm.kill();
                    self.count_on_vm();
                }
                Boot::Failed(Arc::new(error))
            }
        };
        let failed = matches!(state, Boot::Failed(_));
        self.0.boot.send_replace(state);
        if failed && self.vm_now().is_none() {
            self.0.end.send_replace(Some(killed_now()));
        }
    }

    /// From a template if there is one, and else from the kernel, when a template may be left behind.
    async fn boot(&self) -> Result<Guest, Error> {
        for wall in &self.0.config.weaker_jail {
            log::warn!(
                "sandbox {}: the configuration leaves {wall:?} out of the VMM's jail",
                self.0.id
            );
        }
        if let Some(restore) = &self.0.restore {
            restore.complete().await;
            let guest = self.begin(Origin::Snapshot(restore)).await?;
            let guest = self.connect(guest).await?;
            self.rejoin(restore, &guest).await?;
            return Ok(guest);
        }
        let store = self.template_store();
        if let Some(store) = &store
            && let Some(template) = self.find_template(store)
        {
            match self.begin(Origin::Template(template, store)).await {
                Ok(guest) => return self.connect(guest).await,
                Err(error @ Error::Step(..)) => return Err(error),
                // Whoever ended it may end the next as well; the template is not tried again.
                Err(error @ Error::Ended(_)) => {
                    store.discard();
                    return Err(error);
                }
                Err(error) => {
                    log::warn!(
                        "sandbox {} boots, for its template cannot be used: {}",
                        self.0.id,
                        chain(&error)
                    );
                    store.discard();
                    self.give_up_vm().await;
                }
            }
        }
        let making = store.and_then(|store| self.begin_template(&store));
        let guest = self.begin(Origin::Kernel(making)).await?;
        self.connect(guest).await
    }

    /// Reads top to bottom as the order of the start, up to an agent that knows its sandbox.
    async fn begin(&self, origin: Origin<'_>) -> Result<Guest, Error> {
        let limit = Duration::from_secs(self.0.config.boot_timeout_s.into());
        let (events, vsock_events) = mpsc::unbounded_channel();
        self.boot_step(Step::VmmStarted).await?;
        // The VMM process starts first: everything below happens while it initialises.
        let vm = Vm::start(
            &self.0.config.vmm_path(),
            self.jail(),
            self.0.cgroup.clone(),
            self.0.oom_score_adj,
            events,
        )?;
        self.0.timeline.mark("vmm_spawned");
        fault::vmm(vm.process().pid);
        self.boot_step(Step::VmmRecorded).await?;
        self.adopt(&vm, vsock_events)?;
        if matches!(origin, Origin::Kernel(_)) {
            self.count_on_vm();
        }

        self.boot_step(Step::VmmConfigured).await?;
        let (agent_stream, config, descriptors) = self.vm_config(&origin)?;
        let agent = Agent::new(
            agent_stream,
            vm.clone(),
            Duration::from_secs(self.0.config.request_timeout_s.into()),
        )
        .map_err(VmError::Descriptor)?;
        let booted = match vm.boot(config, descriptors, limit).await {
            // The reason of the end says more than the broken request.
            Err(VmError::Gone) => return Err(Error::Ended((*vm.ended().await).clone())),
            Err(VmError::NoAnswer { .. }) => {
                return Err(self.timeout(Step::VmmConfigured.words(), limit).await);
            }
            booted => booted?,
        };
        self.mark_boot(&booted.times);
        self.lock().places = booted.devices;

        self.boot_step(Step::GuestBooted).await?;
        let running = booted.times.running;
        let guest = Guest { vm, agent };
        let attached = match origin {
            Origin::Kernel(None) => {
                // Both wait in the stream for the agent: it takes them one after the other without a round trip.
                let setup = self.setup_request();
                let agent = &guest.agent;
                let (hello, ()) =
                    tokio::try_join!(self.first(agent.hello(limit)), agent.setup_sandbox(&setup, limit))?;
                self.mark_agent(running, &hello);
                true
            }
            Origin::Kernel(Some(making)) => {
                let hello = self.first(guest.agent.hello(limit)).await?;
                self.mark_agent(running, &hello);
                self.write_template(&guest, making).await?;
                guest.agent.setup_sandbox(&self.setup_request(), limit).await?;
                false
            }
            Origin::Template(template, store) => {
                let (resume, setup) = (self.resume_request()?, self.setup_request());
                let agent = &guest.agent;
                let resumed = self.first(agent.resume(&resume, limit));
                if template.written.is_some() {
                    tokio::try_join!(resumed, agent.setup_sandbox(&setup, limit))?;
                } else {
                    resumed.await?;
                    self.list_first(&guest.vm, store).await;
                    agent.setup_sandbox(&setup, limit).await?;
                }
                false
            }
            Origin::Snapshot(restore) => {
                let resume = self.fork_request()?;
                self.first(guest.agent.resume(&resume, limit)).await?;
                // Its processes stand still all the same: they are frozen one by one.
                guest.agent.thaw(&ThawRequest::default()).await?;
                self.unplug_interfaces(&guest, restore).await?;
                false
            }
        };
        self.0.timeline.mark("sandbox_set_up");
        self.count_on_vm();
        if !attached {
            self.attach_interfaces(&guest).await?;
        }
        Ok(guest)
    }

    /// Marks the agent's first answer.
    async fn first<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let answer = answer.await?;
        self.0.timeline.mark("agent_answered");
        Ok(answer)
    }

    /// The rest of the start: network, events.
    async fn connect(&self, guest: Guest) -> Result<Guest, Error> {
        self.boot_step(Step::GuestNetwork).await?;
        let network = self.network().request.take();
        if let Some(request) = network {
            guest.agent.configure_network(&request).await?;
        }
        self.boot_step(Step::GuestEvents).await?;
        let events = guest.agent.events().await?;
        self.0.timeline.mark("sandbox_ready");
        let listener = self.clone();
        tokio::spawn(async move { listener.run_events(events).await });
        self.follow_network(&guest);
        tokio::spawn(self.clone().follow_memory(guest.vm.watch_memory()));
        Ok(guest)
    }

    async fn boot_step(&self, step: Step) -> Result<(), Error> {
        self.lock().boot_step = step;
        fault::reach(step).await.map_err(|error| Error::Step(step, error))
    }

    /// The namespaces of the VMM.
    fn jail(&self) -> Jail<'_> {
        Jail {
            root: self.0.tree.as_ref().map(SharedTree::root),
            user_namespace: !self.0.config.weaker_jail.contains(&Wall::UserNamespace),
        }
    }

    /// Writes the VMM down and watches it.
    fn adopt(&self, vm: &Vm, mut vsock_events: mpsc::UnboundedReceiver<VsockEvent>) -> Result<(), Error> {
        let process = vm.process();
        let entry = Entry::Process {
            pid: process.pid,
            start_time: process.start_time,
            role: Role::Vmm,
        };
        if let Some(journal) = &*self.0.journal.lock().unwrap_or_else(PoisonError::into_inner) {
            journal.record(&entry)?;
        }
        self.lock().vm = Some(vm.clone());
        let sandbox = self.clone();
        tokio::spawn(async move {
            while let Some(event) = vsock_events.recv().await {
                match event {
                    VsockEvent::Connected(port) => log::debug!("stream {port} connected"),
                    VsockEvent::FirstData(port, time) => sandbox.first_data(port, time),
                    VsockEvent::Closed(port) => sandbox.0.streams.ended(port),
                }
            }
        });
        Ok(())
    }

    /// From here on the end of the VM is that of the sandbox.
    pub(super) fn count_on_vm(&self) {
        let vm = {
            let mut state = self.lock();
            if std::mem::replace(&mut state.vm_counts, true) {
                return;
            }
            state.vm.clone()
        };
        if let Some(vm) = vm {
            let sandbox = self.clone();
            tokio::spawn(async move {
                let end = vm.ended().await;
                sandbox.vm_ended(&end);
            });
        }
    }

    /// The host's end of the agent's stream, and the VM's description with its descriptors.
    fn vm_config(&self, origin: &Origin<'_>) -> Result<(OwnedFd, VmConfig, Vec<OwnedFd>), Error> {
        let config = &self.0.config;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(VmError::Descriptor)?;
        let mut fds = Descriptors::default();
        let kvm = fds.add(open_for_vm("KVM", "/dev/kvm".as_ref(), true)?);
        let start = match origin {
            Origin::Kernel(_) => Start::Kernel {
                kernel: fds.add(open_for_vm("guest kernel", &config.kernel, false)?),
                command_line: config.kernel_parameters.clone(),
            },
            Origin::Template(template, _) => Start::Snapshot {
                state: fds.add(template.state.try_clone().map_err(VmError::Descriptor)?.into()),
                memory: fds.add(template.memory.try_clone().map_err(VmError::Descriptor)?.into()),
                written: match &template.written {
                    Some(lists) => Some(control::Written {
                        first: fds.add(lists.first.try_clone().map_err(VmError::Descriptor)?.into()),
                        later: fds.add(lists.later.try_clone().map_err(VmError::Descriptor)?.into()),
                    }),
                    None => None,
                },
            },
            Origin::Snapshot(restore) => {
                let snapshot = restore.snapshot();
                Start::Snapshot {
                    state: fds.add(snapshot.state.try_clone().map_err(VmError::Descriptor)?.into()),
                    memory: fds.add(snapshot.memory.try_clone().map_err(VmError::Descriptor)?.into()),
                    written: None,
                }
            }
        };
        let root = fds.add(open_for_vm("root image", &config.image, false)?);
        let share = self.0.tree.as_ref().map(|_| Share {
            tag: SHARE_TAG.into(),
        });
        let agent = fds.add(theirs.into());
        let net_slots = self.net_slots();
        self.network().slots = net_slots;
        // The VMM's copies are the only ones: a tap goes when it closes them. A VM that is or becomes a template gets
        // them later.
        let nets: Vec<control::Net> = match origin {
            Origin::Kernel(None) => std::mem::take(&mut self.network().nets)
                .into_iter()
                .map(|net| self.describe_net(net, &mut fds))
                .collect(),
            _ => Vec::new(),
        };
        let (size, max_vcpus, hotplug_mib) = {
            let sizing = &self.lock().sizing;
            (sizing.boot(), sizing.max_vcpus(), sizing.hotplug_mib())
        };
        let (vcpus, disks) = match origin {
            Origin::Snapshot(restore) => {
                let mut disks = Vec::new();
                for (slot, disk) in restore.take_disks() {
                    let files = disk.files.into_iter().map(|file| fds.add(file)).collect();
                    let read_only = disk.read_only;
                    disks.push((slot, control::Disk { files, read_only }));
                }
                (restore.snapshot().manifest.machine.vcpus, disks)
            }
            _ => (size.vcpus, Vec::new()),
        };
        let vm_config = VmConfig {
            version: control::VERSION,
            vcpus,
            max_vcpus,
            memory_mib: size.memory_mib,
            hotplug_mib,
            kvm,
            start,
            guest_cid: self.guest_cid()?,
            root,
            console: config.console,
            disk_slots: config.disk_slots,
            disks,
            net_slots,
            nets,
            share,
            vsock_listeners: vec![(ports::AGENT, agent)],
            balloon: config.balloon,
            seccomp: !config.weaker_jail.contains(&Wall::Seccomp),
        };
        Ok((ours.into(), vm_config, fds.into_vec()))
    }

    /// The first byte of a stream has come.
    fn first_data(&self, port: u32, monotonic_us: u64) {
        let timeline = &self.0.timeline;
        if self.0.streams.is_output(port) && timeline.mark_once("first_output", monotonic_us) {
            timeline.save(&self.0.id);
        }
    }

    fn mark_boot(&self, times: &BootTimes) {
        let timeline = &self.0.timeline;
        for (phase, time) in [
            ("vmm_main", times.started),
            ("vmm_configured", times.configured),
            ("vmm_memory", times.memory),
            ("vmm_kernel_loaded", times.kernel),
            ("vmm_devices", times.devices),
            ("vm_running", times.running),
        ] {
            timeline.mark_at(phase, time);
        }
    }

    fn mark_agent(&self, running: u64, hello: &HelloResponse) {
        let timeline = &self.0.timeline;
        timeline.mark_at("agent_main", running.saturating_add(hello.main_uptime_us));
        timeline.mark_at("agent_ready", running.saturating_add(hello.ready_uptime_us));
    }

    fn setup_request(&self) -> SetupSandboxRequest {
        SetupSandboxRequest {
            sandbox_id: self.0.id.clone(),
            hostname: self.0.hostname.clone(),
            realtime_ns: now_ns(),
            shared_tag: SHARE_TAG.into(),
            sysctls: self.0.sysctls.clone(),
            shm_size: self.0.shm_size,
            files: self.0.files.clone(),
            ..SetupSandboxRequest::default()
        }
    }

    /// A process of a container was killed for lack of memory, says the agent. A guest that says so without an end
    /// must not push the exits out of the queue to the caller.
    fn out_of_memory(&self, container: String) {
        let passes = self.with(&container, |record| {
            Ok(record.oom.pass(std::time::Instant::now()))
        });
        if let Ok(Some(_)) = passes {
            self.0.sink.event(SandboxEvent::OutOfMemory { container });
        }
    }

    /// Takes the agent's events until the connection ends. Without them exits would be lost, so the VM
    /// does not outlive them.
    pub(super) async fn run_events(self, mut events: Events) {
        while let Some(event) = events.next().await {
            match event {
                event::Kind::Exited(exited) => {
                    if let Some(id) = self.id_of(&exited.container_id) {
                        self.process_exited(&id, &exited.exec_id, exited.exit_status);
                    }
                }
                event::Kind::Oom(oom) => {
                    if let Some(id) = self.id_of(&oom.container_id) {
                        self.out_of_memory(id);
                    }
                }
                // Not handed out by the stream.
                _ => break,
            }
        }
        if let Some(vm) = self.vm_now()
            && vm.end().is_none()
            && !self.is_stopping()
        {
            // The end of the VM breaks the connection first; give it the time to be seen.
            if tokio::time::timeout(Duration::from_secs(1), vm.ended())
                .await
                .is_err()
            {
                let reason = match self.agent_now().ok().and_then(|agent| agent.violation()) {
                    Some(violation) => format!("killed: the guest agent sent {violation}"),
                    None => "killed: the guest agent ended the connection".to_owned(),
                };
                log::error!("sandbox {}: {reason}", self.0.id);
                vm.kill_because(reason);
            }
        }
    }
}
