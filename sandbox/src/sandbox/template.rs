//! Where the sandbox's VM begins: at a kernel, or at a template.

use std::fs::File;
use std::io::Read;

use bulkhead_protocol::agent::{self, PrepareRequest, ResumeRequest};
use bulkhead_protocol::control::Request;
use bulkhead_protocol::ports;

use super::network::net_slots;
use super::restore::Restore;
use super::*;
use crate::config::Templates;
use crate::error::chain;
use crate::template::{self, Identity, Making, Shape, Store, Template, TemplateError, Written};
use crate::vm::VmError;

/// Bytes that a restored guest's generator is reseeded with.
const ENTROPY: usize = 64;

/// Where a VM begins.
pub(super) enum Origin<'a> {
    /// At its kernel; it may leave a template behind.
    Kernel(Option<Box<Making>>),
    /// Where the template was written, which is of this store.
    Template(Template, &'a Store),
    /// Where a running pod was written down.
    Snapshot(&'a Restore),
}

impl Sandbox {
    /// Templates for this sandbox's VM; none if the configuration wants none.
    pub(super) fn template_store(&self) -> Option<Store> {
        if self.0.config.templates == Templates::Off {
            return None;
        }
        match self.shape() {
            Ok(shape) => Some(Store::new(&self.0.config.template_dir, shape)),
            Err(error) => {
                log::warn!("sandbox {} has no template: {}", self.0.id, chain(&error));
                None
            }
        }
    }

    fn shape(&self) -> Result<Shape, TemplateError> {
        let config = &self.0.config;
        let (size, max_vcpus, hotplug_mib) = {
            let sizing = &self.lock().sizing;
            (sizing.boot(), sizing.max_vcpus(), sizing.hotplug_mib())
        };
        Ok(Shape {
            scope: (config.templates == Templates::Namespace).then(|| self.0.namespace.clone()),
            files: [
                Identity::of(&config.kernel)?,
                Identity::of(&config.image)?,
                Identity::of(&config.vmm_path())?,
            ],
            command_line: config.kernel_parameters.clone(),
            vcpus: size.vcpus,
            max_vcpus,
            memory_mib: size.memory_mib,
            hotplug_mib,
            console: config.console,
            balloon: config.balloon,
            disk_slots: config.disk_slots,
            net_slots: self.net_slots(),
            host_boot: template::host_boot()?,
            versions: template::VERSIONS,
        })
    }

    /// Network slots of the VM.
    pub(super) fn net_slots(&self) -> u32 {
        if let Some(restore) = &self.0.restore {
            return restore.snapshot().manifest.machine.net_slots;
        }
        let present = self.network().nets.len();
        net_slots(present, &self.0.config)
    }

    pub(super) fn find_template(&self, store: &Store) -> Option<Template> {
        store.find().unwrap_or_else(|error| {
            log::warn!(
                "sandbox {} boots without a template: {}",
                self.0.id,
                chain(&error)
            );
            None
        })
    }

    pub(super) fn begin_template(&self, store: &Store) -> Option<Box<Making>> {
        match store.begin() {
            Ok(making) => making.map(Box::new),
            Err(error) => {
                log::warn!("sandbox {} leaves no template: {}", self.0.id, chain(&error));
                None
            }
        }
    }

    /// Writes the VM down: the agent serves, and nothing of the pod is in it. Without success the sandbox goes on all the
    /// same, if the VM does.
    pub(super) async fn write_template(
        &self,
        Guest { vm, agent }: &Guest,
        mut making: Box<Making>,
    ) -> Result<(), Error> {
        let Some(files) = making.take_files() else {
            return Ok(());
        };
        if let Err(error) = agent.prepare(&PrepareRequest::default()).await {
            log::warn!("sandbox {} leaves no template: {}", self.0.id, chain(&error));
            return Ok(());
        }
        match vm.ask(Request::Pause, Vec::new()).await {
            // It cannot be stopped now, and runs on.
            Err(error @ VmError::Refused { .. }) => {
                log::warn!("sandbox {} leaves no template: {}", self.0.id, chain(&error));
                return Ok(());
            }
            paused => paused?,
        }
        let written = vm.snapshot(files.state.into(), files.memory.into()).await;
        vm.ask(Request::Resume, Vec::new()).await?;
        let finished = match written {
            Ok(()) => making.finish().map_err(|error| chain(&error)),
            Err(error) => Err(chain(&error)),
        };
        match finished {
            Ok(()) => self.0.timeline.mark("template_written"),
            Err(error) => log::warn!("sandbox {} leaves no template: {error}", self.0.id),
        }
        Ok(())
    }

    /// Lists, for later pods of the template, what this one's guest has written up to its first answer. What goes wrong
    /// costs them time, and nobody else anything.
    pub(super) async fn list_first(&self, vm: &Vm, store: &Store) {
        match list_written(vm).await {
            Ok(first) => {
                let store = store.clone();
                self.lock().unlisted = Some(Unlisted { store, first });
            }
            Err(error) => log::debug!("sandbox {} leaves no list of written memory: {error}", self.0.id),
        }
    }

    /// Lists what the guest has written up to its first container, and shows both lists to others.
    pub(super) fn list_later(&self) {
        let (unlisted, vm) = {
            let mut state = self.lock();
            (state.unlisted.take(), state.vm.clone())
        };
        let (Some(Unlisted { store, first }), Some(vm)) = (unlisted, vm) else {
            return;
        };
        let id = self.0.id.clone();
        tokio::spawn(async move {
            let lists = list_written(&vm).await.and_then(|later| {
                let lists = Written { first, later };
                store.keep_written(&lists).map_err(|error| chain(&error))?;
                Ok(lists.later)
            });
            let later = match lists {
                Ok(later) => later,
                Err(error) => {
                    log::debug!("sandbox {id} leaves no list of written memory: {error}");
                    return;
                }
            };
            let done = tokio::task::spawn_blocking(move || store.enlarge_pages(&later)).await;
            if let Ok(Err(error)) = done {
                log::debug!("sandbox {id} leaves memory in small pages: {}", chain(&error));
            }
        });
    }

    /// Ends a VM that did not come to use. What it was given is given to the next.
    pub(super) async fn give_up_vm(&self) {
        let Some(vm) = self.lock().vm.take() else {
            return;
        };
        vm.kill();
        if tokio::time::timeout(crate::limits::KILL_TIME, vm.ended())
            .await
            .is_err()
        {
            log::error!("sandbox {}: a VMM does not end", self.0.id);
        }
    }

    /// What makes a restored guest one of its own.
    pub(super) fn resume_request(&self) -> Result<ResumeRequest, VmError> {
        Ok(ResumeRequest {
            version: agent::VERSION,
            entropy: random::<ENTROPY>()?.to_vec(),
            realtime_ns: now_ns(),
            ..ResumeRequest::default()
        })
    }

    /// What makes a guest that had a pod the guest of this one.
    pub(super) fn fork_request(&self) -> Result<ResumeRequest, VmError> {
        let machine_id: [u8; 16] = random()?;
        Ok(ResumeRequest {
            machine_id: machine_id.iter().map(|byte| format!("{byte:02x}")).collect(),
            hostname: if self.0.hostname.is_empty() {
                self.0.id.clone()
            } else {
                self.0.hostname.clone()
            },
            fork: true,
            files: self.0.files.clone(),
            ..self.resume_request()?
        })
    }

    /// A context id for the guest, which no other is likely to have.
    pub(super) fn guest_cid(&self) -> Result<u32, VmError> {
        let number = u32::from_le_bytes(random()?);
        Ok(ports::FIRST_GUEST_CID + number % (u32::MAX - ports::FIRST_GUEST_CID))
    }
}

/// What the VM's guest has written since it began, or the reason why it is not known.
async fn list_written(vm: &Vm) -> Result<Vec<u8>, String> {
    match vm.list_written().await {
        Ok(Some(list)) => Ok(list),
        Ok(None) => Err("it is too long".to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

/// Bytes of the host's generator.
fn random<const COUNT: usize>() -> Result<[u8; COUNT], VmError> {
    let mut bytes = [0; COUNT];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(VmError::Descriptor)?;
    Ok(bytes)
}
