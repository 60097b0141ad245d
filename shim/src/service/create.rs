//! What the creation of a task needs of its request: specification, place in the pod, streams.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use bulkhead_sandbox::fault::{self, Step};
use bulkhead_sandbox::mount::Mount;
use bulkhead_sandbox::{ContainerRequest, Error, PidNamespace, Role, Stdio, spec};
use containerd_shim_protos::api;
use oci_spec::runtime::Spec;

use super::{Result, Service};
use crate::anchor;
use crate::io::Paths;
use crate::status::from_sandbox;

impl Service {
    /// Which processes a container sees: in a pod, the path of its pid namespace names the sandbox's process or
    /// another container's.
    fn pid_namespace(&self, spec: &Spec, role: Role) -> PidNamespace {
        let Some(path) = spec::pid_namespace_path(spec).filter(|_| role == Role::Container) else {
            return PidNamespace::Own;
        };
        let anchor = anchor::id_of(path);
        let tasks = self.tasks();
        let target = tasks
            .iter()
            .find(|(_, task)| task.anchor.is_some() && anchor == Some(task.pid()));
        match target {
            Some((id, _)) => PidNamespace::Container(id.clone()),
            None => PidNamespace::Pod,
        }
    }

    fn spec_of(&self, bundle: &Path) -> std::result::Result<Spec, Error> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        match first {
            Some((first_bundle, spec)) if first_bundle == bundle => Ok(spec),
            _ => Ok(spec::load(bundle)?),
        }
    }

    pub(super) async fn create_container(
        &self,
        request: &api::CreateTaskRequest,
        paths: &Paths,
    ) -> Result<()> {
        let bundle = PathBuf::from(&request.bundle);
        let spec = self.spec_of(&bundle).map_err(from_sandbox)?;
        let role = self.pod.role(&request.id)?;
        let pid_namespace = self.pid_namespace(&spec, role);
        fault::reach(Step::StreamsOpened)
            .await
            .map_err(|error| from_sandbox(Error::Step(Step::StreamsOpened, error)))?;
        let stdio = if role == Role::Sandbox {
            Stdio::default()
        } else {
            self.open_streams(&request.id, paths).await?
        };
        let root = request
            .rootfs
            .iter()
            .map(|mount| Mount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            })
            .collect();
        let container = ContainerRequest {
            id: request.id.clone(),
            spec,
            bundle,
            root,
            stdio,
            role,
            pid_namespace,
        };
        self.sandbox()?.create(container).await.map_err(from_sandbox)
    }
}

/// A task that is forgotten again unless it is made.
pub(super) struct NewTask<'a> {
    pub(super) service: &'a Service,
    pub(super) id: &'a str,
    pub(super) keep: bool,
}

impl Drop for NewTask<'_> {
    fn drop(&mut self) {
        if !self.keep {
            self.service.tasks().remove(self.id);
        }
    }
}
