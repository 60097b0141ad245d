//! The VMM process: one control socket, one VM, one event loop.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::control::{
    BootTimes, Booted, Channel, ChannelError, DeviceStatus, Event, Exit, ExitReason, Inspection, Received,
    Reply, Request, RequestMessage, VmmMessage,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::error_chain;
use crate::event_loop::{DeviceLoop, wait, watch};
use crate::machine::{BuildError, Machine, SnapshotError, attach_net, now, open_disk, take_fd};
use crate::virtio::vsock::VsockEvent;

/// Epoll data of the main loop.
const CONTROL: u64 = 0;
const EXIT: u64 = 1;
const DEVICES: u64 = 2;
const KICKS: u64 = 3;

/// How long far ends get to take what the guest sent before it ended.
const DELIVERY_TIME: Duration = Duration::from_millis(500);

/// Bytes of memory that are prepared before devices have another turn: some tens of microseconds.
const PREPARED_AT_ONCE: u64 = 32 << 10;

/// Bytes of console output in an exit report, and in an inspection.
const EXIT_CONSOLE: usize = 4 << 10;
const INSPECT_CONSOLE: usize = 16 << 10;

/// Why the process could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The control socket.
    #[error("Control socket failed")]
    Channel(#[source] ChannelError),
    /// The first request is not `Boot`.
    #[error("The first request must be Boot")]
    NotBoot,
    /// The VM could not be built; the sandbox has been told.
    #[error("Cannot build the VM")]
    Build(#[source] BuildError),
    /// The event loop.
    #[error("Event loop failed")]
    Poll(#[source] io::Error),
}

/// Serves one VM until it ends or the other end of `channel` closes.
///
/// # Errors
/// [`ServerError`]. When the VM itself ends that is no error.
pub fn serve(channel: &Channel, started: u64) -> Result<(), ServerError> {
    let mut request: Received<RequestMessage> = channel.receive().map_err(ServerError::Channel)?;
    let id = request.message.id;
    let Request::Boot(config) = request.message.request.clone() else {
        send(
            channel,
            &VmmMessage::Reply {
                id,
                result: Err(ServerError::NotBoot.to_string()),
            },
        )?;
        return Err(ServerError::NotBoot);
    };
    let mut times = BootTimes {
        started,
        configured: now(),
        ..BootTimes::default()
    };
    let machine = match Machine::build(&config, &mut request, &mut times) {
        Ok(machine) => machine,
        Err(error) => {
            send(
                channel,
                &VmmMessage::Reply {
                    id,
                    result: Err(error_chain(&error)),
                },
            )?;
            return Err(ServerError::Build(error));
        }
    };
    drop(request);
    let devices = machine.devices.iter().map(|device| device.name().to_owned());
    let devices = devices.collect();
    send(
        channel,
        &VmmMessage::Reply {
            id,
            result: Ok(Reply::Booted(Booted { times, devices })),
        },
    )?;
    Server::new(channel, machine)?.run()
}

fn send(channel: &Channel, message: &VmmMessage) -> Result<(), ServerError> {
    channel.send(message, &[]).map_err(ServerError::Channel)
}

struct Server<'a> {
    channel: &'a Channel,
    machine: Machine,
    poll: Epoll,
    devices: DeviceLoop,
    paused: bool,
    /// Whether the guest has given its first answer.
    answered: bool,
    /// Added memory the sandbox was told of.
    memory_mib: u32,
}

impl<'a> Server<'a> {
    fn new(channel: &'a Channel, machine: Machine) -> Result<Self, ServerError> {
        let poll = Epoll::new().map_err(ServerError::Poll)?;
        let devices = DeviceLoop::new(&machine.devices, &machine.vsock).map_err(ServerError::Poll)?;
        for (fd, data) in [
            (channel.as_raw_fd(), CONTROL),
            (machine.exit_event.as_raw_fd(), EXIT),
            (devices.descriptor(), DEVICES),
            (machine.busy_queues.as_raw_fd(), KICKS),
        ] {
            watch(&poll, fd, data).map_err(ServerError::Poll)?;
        }
        Ok(Self {
            channel,
            machine,
            poll,
            devices,
            paused: false,
            answered: false,
            memory_mib: 0,
        })
    }

    fn run(&mut self) -> Result<(), ServerError> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let preparing = self.answered && !self.paused && !self.machine.soon.is_empty();
            let timeout = if preparing { 0 } else { -1 };
            let count = wait(&self.poll, timeout, &mut events).map_err(ServerError::Poll)?;
            if count == 0 {
                self.machine.soon.prepare_step(PREPARED_AT_ONCE);
            }
            for event in &events[..count] {
                match event.data() {
                    CONTROL => match self.channel.receive() {
                        Ok(request) => self.answer(request)?,
                        // The sandbox has gone, and the VM with it.
                        Err(ChannelError::Closed) => return Ok(()),
                        Err(error) => return Err(ServerError::Channel(error)),
                    },
                    EXIT => {
                        let reason = self
                            .machine
                            .exits
                            .try_recv()
                            .unwrap_or_else(|_| ExitReason::VmmError("exit without a reason".into()));
                        return self.report_exit(reason);
                    }
                    // A pause may have come in the same batch.
                    DEVICES if !self.paused => {
                        self.devices.turn(Duration::ZERO).map_err(ServerError::Poll)?;
                    }
                    KICKS => self.machine.hand_kicks_over(),
                    _ => {}
                }
            }
            self.send_vsock_events()?;
            self.send_memory_size()?;
        }
    }

    /// Tells of memory that the guest has taken or given back.
    fn send_memory_size(&mut self) -> Result<(), ServerError> {
        let Some(hotplug) = &self.machine.hotplug else {
            return Ok(());
        };
        let mib = (lock(&hotplug.device).plugged() >> 20) as u32;
        if std::mem::replace(&mut self.memory_mib, mib) == mib {
            return Ok(());
        }
        send(self.channel, &VmmMessage::Event(Event::MemorySize { mib }))
    }

    fn send_vsock_events(&mut self) -> Result<(), ServerError> {
        let events = lock(&self.machine.vsock).take_events();
        for event in events {
            let message = match event {
                VsockEvent::Connected { port } => VmmMessage::Event(Event::VsockConnected { port }),
                VsockEvent::FirstData { port } => {
                    self.answered = true;
                    VmmMessage::Event(Event::VsockFirstData {
                        port,
                        monotonic_us: now(),
                    })
                }
                VsockEvent::Closed { port } => VmmMessage::Event(Event::VsockClosed { port }),
                VsockEvent::ConnectResult { token, result } => VmmMessage::Reply {
                    id: token,
                    result: result.map(|()| Reply::Done).map_err(|error| error_chain(&error)),
                },
            };
            send(self.channel, &message)?;
        }
        Ok(())
    }

    fn report_exit(&mut self, reason: ExitReason) -> Result<(), ServerError> {
        // Other vCPUs may still run. One that does not stop adds to its queues for the time of the delivery.
        let _ = self.machine.vcpus.pause();
        self.devices.deliver(DELIVERY_TIME).map_err(ServerError::Poll)?;
        self.send_vsock_events()?;
        let console = self.machine.console.tail(EXIT_CONSOLE);
        match send(
            self.channel,
            &VmmMessage::Event(Event::Exited(Exit { reason, console })),
        ) {
            Err(ServerError::Channel(ChannelError::Closed)) => Ok(()),
            result => result,
        }
    }

    fn answer(&mut self, mut request: Received<RequestMessage>) -> Result<(), ServerError> {
        let id = request.message.id;
        // A connection's answer comes from the guest, by `send_vsock_events`.
        if let Some(result) = self.perform(&mut request).transpose() {
            send(self.channel, &VmmMessage::Reply { id, result })?;
        }
        Ok(())
    }

    /// Carries a request out; `None`: it is answered later.
    fn perform(&mut self, request: &mut Received<RequestMessage>) -> Result<Option<Reply>, String> {
        let text = |error: &dyn std::error::Error| error_chain(error);
        let id = request.message.id;
        match request.message.request.clone() {
            Request::Boot(_) => return Err("The VM is booted already".into()),
            Request::Pause => self.pause()?,
            Request::Resume => self.resume().map_err(|error| text(&error))?,
            Request::VsockListen { port, far_end } => {
                let far_end = take_fd(request, "far_end", far_end).map_err(|error| text(&error))?;
                lock(&self.machine.vsock)
                    .listen(port, far_end)
                    .map_err(|error| text(&error))?;
            }
            Request::VsockUnlisten { port } => {
                lock(&self.machine.vsock)
                    .unlisten(port)
                    .map_err(|error| text(&error))?;
            }
            Request::VsockConnect { port, far_end } => {
                let far_end = take_fd(request, "far_end", far_end).map_err(|error| text(&error))?;
                lock(&self.machine.vsock)
                    .connect(port, far_end, id)
                    .map_err(|error| text(&error))?;
                return Ok(None);
            }
            Request::AttachDisk { slot, disk } => {
                let image = open_disk(&disk, slot, |what, fd| take_fd(request, what, fd))
                    .map_err(|error| text(&error))?;
                lock(self.disk(slot)?)
                    .attach(image)
                    .map_err(|error| text(&error))?;
            }
            Request::DetachDisk { slot } => {
                lock(self.disk(slot)?).detach().map_err(|error| text(&error))?;
            }
            Request::AttachNet { slot, net } => {
                let mut device = lock(self.net(slot)?);
                attach_net(&mut device, &net, |what, fd| take_fd(request, what, fd))
                    .map_err(|error| text(&error))?;
            }
            Request::DetachNet { slot } => {
                lock(self.net(slot)?).detach().map_err(|error| text(&error))?;
            }
            Request::SetBalloon { mib } => {
                let balloon = self.machine.balloon.as_ref().ok_or("The VM has no balloon")?;
                lock(balloon).set_target_mib(mib).map_err(|error| text(&error))?;
            }
            Request::AddVcpus { count } => {
                self.machine.add_vcpus(count).map_err(|error| text(&error))?;
            }
            Request::SetMemory { mib } => {
                self.machine.set_memory(mib).map_err(|error| text(&error))?;
            }
            Request::Snapshot {
                state,
                memory,
                pagemap,
            } => {
                let mut take = |what, fd| {
                    let file = take_fd(request, what, fd).map(File::from);
                    file.map_err(|error| text(&error))
                };
                let (mut state, memory) = (take("state", state)?, take("memory", memory)?);
                let pagemap = take("pagemap", pagemap)?;
                if !self.paused {
                    return Err(text(&SnapshotError::Running));
                }
                self.machine
                    .save(&mut state, &memory, &pagemap)
                    .map_err(|error| text(&error))?;
            }
            Request::ListWritten { list, pagemap } => {
                let list = take_fd(request, "list", list).map_err(|error| text(&error))?;
                let pagemap = take_fd(request, "pagemap", pagemap).map_err(|error| text(&error))?;
                self.machine
                    .list_written(&list.into(), &pagemap.into())
                    .map_err(|error| text(&error))?;
            }
            Request::Inspect => return Ok(Some(Reply::Inspected(self.inspect()))),
        }
        Ok(Some(Reply::Done))
    }

    fn disk(&self, slot: u32) -> Result<&Mutex<crate::virtio::block::Block>, String> {
        let disks = &self.machine.disks;
        disks
            .get(slot as usize)
            .map(|disk| &**disk)
            .ok_or_else(|| format!("slot is {slot}; the VM has {} disk slots", disks.len()))
    }

    fn net(&self, slot: u32) -> Result<&Mutex<crate::virtio::net::Net>, String> {
        let nets = &self.machine.nets;
        nets.get(slot as usize)
            .map(|net| &**net)
            .ok_or_else(|| format!("slot is {slot}; the VM has {} network slots", nets.len()))
    }

    /// Stops everything, or nothing if something does not stop in time.
    fn pause(&mut self) -> Result<(), String> {
        if self.paused {
            return Ok(());
        }
        let stopped = self.machine.vcpus.pause().map_err(|error| error_chain(&error));
        let stopped = stopped.and_then(|()| {
            for device in &self.machine.devices {
                device
                    .pause()
                    .map_err(|error| format!("{} does not pause: {}", device.name(), error_chain(&error)))?;
            }
            let none = EpollEvent::default();
            self.poll
                .ctl(ControlOperation::Delete, self.devices.descriptor(), none)
                .map_err(|error| error_chain(&error))
        });
        match stopped {
            Ok(()) => self.paused = true,
            Err(_) => self.release(),
        }
        stopped
    }

    /// Lets devices and vCPUs go on.
    fn release(&self) {
        for device in &self.machine.devices {
            device.resume();
        }
        self.machine.vcpus.resume();
    }

    fn resume(&mut self) -> io::Result<()> {
        if !self.paused {
            return Ok(());
        }
        watch(&self.poll, self.devices.descriptor(), DEVICES)?;
        self.paused = false;
        self.release();
        Ok(())
    }

    fn inspect(&self) -> Inspection {
        let devices = self.machine.devices.iter();
        Inspection {
            paused: self.paused,
            console: self.machine.console.tail(INSPECT_CONSOLE),
            devices: devices
                .map(|device| DeviceStatus {
                    name: device.name().to_owned(),
                    status: device.status(),
                })
                .collect(),
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
