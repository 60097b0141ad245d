//! Starting a container's program, and further processes in it.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use libcontainer::oci_spec::runtime::Capability;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::{Process as ProcessSpec, Spec};

use super::create::{builder, keep, reported_pid, state_root, with_streams};
use super::executor::{Confinement, ProgramExecutor};
use super::spec::{adapt_process, valid_id};
use super::{Container, Containers, Process, Status};
use crate::cgroup::Cgroup;
use crate::error::{Error, chain};
use crate::job::{self, Job, Report, StatusPipe};
use crate::streams::{HostEnds, ProgramEnds};

impl Containers {
    /// Lets a container's init process execute its program; returns when it has,
    /// at the latest after `limit`.
    ///
    /// # Errors
    /// The container is not in the created state, or the program cannot be executed.
    pub async fn start(&self, id: &str, limit: Duration) -> Result<(), Error> {
        let container = self.get(id)?;
        let _turn = container.turn.lock().await;
        container.expect_status(Status::Created)?;
        let pipe = container.state().status_pipe.take();
        notify(&container.directory, id).map_err(Error::io("cannot reach the container's init process"))?;
        let fail = |reason| Error::Start {
            id: id.to_owned(),
            reason,
        };
        if let Some(pipe) = pipe {
            match tokio::time::timeout(limit, job::outcome(pipe)).await {
                Ok(outcome) => outcome.map_err(|error| fail(chain(&error)))?,
                Err(_) => return Err(fail(format!("no program after {} s", limit.as_secs()))),
            }
        }
        let mut state = container.state();
        // It may have exited already.
        if state.status == Status::Created {
            state.status = Status::Running;
        }
        Ok(())
    }

    /// Starts a further process in a running container, within `limit`.
    ///
    /// # Errors
    /// The request makes no sense, the container does not run, or the program cannot be executed.
    pub async fn exec(
        self: &Arc<Self>,
        request: proto::ExecProcessRequest,
        limit: Duration,
    ) -> Result<Pid, Error> {
        let container = self.get(&request.container_id)?;
        let exec = request.exec_id.as_str();
        if !valid_id(exec) {
            return Err(Error::Invalid {
                field: "exec_id",
                value: exec.to_owned(),
            });
        }
        container.expect_status(Status::Running)?;
        let fail = |source| Error::Exec {
            id: container.id.clone(),
            exec: exec.to_owned(),
            source: Box::new(source),
        };
        let process: ProcessSpec = serde_json::from_slice(&request.process_json)
            .map_err(|source| Error::Json {
                field: "process_json",
                source,
            })
            .map_err(fail)?;
        container.reserve_exec(exec)?;
        let result = self
            .build_exec(&container, exec, process, request.streams.get_or_default(), limit)
            .await;
        if result.is_err() {
            container.forget_exec(exec);
        }
        result.map_err(fail)
    }

    async fn build_exec(
        &self,
        container: &Arc<Container>,
        exec: &str,
        mut process: ProcessSpec,
        wanted: &proto::Streams,
        limit: Duration,
    ) -> Result<Pid, Error> {
        let mut notices = Vec::new();
        adapt_process(&mut process, wanted.terminal, &mut notices).map_err(Error::Spec)?;
        for notice in notices {
            log::info!("container {}: {notice}", container.id);
        }
        let user = (process.user().uid(), process.user().gid());
        // Nobody closes it.
        let _turn = self.additions.acquire().await.ok();
        let host = HostEnds::dial(&self.host, wanted).await.map_err(Error::Streams)?;
        let stdio = self.stdio(host, wanted, user)?;
        let sub_cgroup = container.init_sub_cgroup();
        let (program, console) = (stdio.program, stdio.console);
        let keep = program.as_ref().map(keep).unwrap_or_default();
        let console_path = console.as_ref().map(|console| console.path.clone());
        let _birth = self.reaper.birth();
        // A terminal is made by the process itself; the program must not see it before the agent has prepared it.
        let gate = match &console {
            None => None,
            Some(_) => Some(pipe2(OFlag::O_CLOEXEC).map_err(Error::io("cannot make a pipe"))?),
        };
        let (wait, go) = gate.unzip();
        let keep: Vec<i32> = keep
            .into_iter()
            .chain(wait.as_ref().map(AsRawFd::as_raw_fd))
            .collect();
        let helper = Helper {
            container,
            exec,
            process,
            sub_cgroup,
            gate: wait,
        };
        let mut job = Job::spawn(&self.reaper, "start of the process", &keep, move |status| {
            helper.run(program, console_path, status)
        })?;
        let finish = job.finish(limit);
        let (reports, terminal) = match console {
            None => (finish.await, None),
            Some(console) => {
                let prepare = async {
                    let terminal = console.finish(limit).await;
                    drop(go);
                    terminal
                };
                with_terminal(finish, prepare).await
            }
        };
        let pid = reports.and_then(|reports| reported_pid(&reports));
        let (terminal, copies) = match terminal {
            None => (None, stdio.copies),
            Some(Ok((terminal, copies))) => (Some(terminal), Some(copies)),
            Some(Err(error)) => {
                // Without its terminal the process is of no use, and nobody has heard of it yet.
                if let Ok(pid) = pid {
                    let _ = kill(pid, Signal::SIGKILL);
                }
                return Err(error);
            }
        };
        let pid = pid?;
        if let Some(process) = container.state().execs.get_mut(exec) {
            process.terminal = terminal;
            process.copies = copies;
        }
        container.adopt_exec(&self.reaper, exec, pid);
        Ok(pid)
    }
}

/// Waits for both; for the terminal in vain no longer than the helper lives.
async fn with_terminal<R, E, T>(
    helper: impl Future<Output = Result<R, E>>,
    terminal: impl Future<Output = T>,
) -> (Result<R, E>, Option<T>) {
    let (mut helper, mut terminal) = (std::pin::pin!(helper), std::pin::pin!(terminal));
    tokio::select! {
        biased;
        terminal = &mut terminal => (helper.await, Some(terminal)),
        result = &mut helper => match result {
            Ok(result) => (Ok(result), Some(terminal.await)),
            Err(error) => (Err(error), None),
        },
    }
}

impl Container {
    fn reserve_exec(&self, exec: &str) -> Result<(), Error> {
        let mut state = self.state();
        if state
            .execs
            .get(exec)
            .is_some_and(|process| process.exit.borrow().is_none())
        {
            return Err(Error::ProcessExists(self.id.clone(), exec.to_owned()));
        }
        state.execs.insert(exec.to_owned(), Process::new());
        state.exited.retain(|other| other != exec);
        state.live += 1;
        Ok(())
    }

    fn forget_exec(&self, exec: &str) {
        let mut state = self.state();
        state.execs.remove(exec);
        state.live = state.live.saturating_sub(1);
        self.report_init_exit(&mut state);
    }

    /// The group of the init process below the container's: a container that manages cgroups itself moves its
    /// processes down, and then nothing may join the container's own group (cgroup v2, no internal processes).
    fn init_sub_cgroup(&self) -> Option<String> {
        let pid = self.state().init.running()?;
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        sub_cgroup(&text, &Cgroup::spec_path(&self.id))
    }
}

/// The part of a process's cgroup (`/proc/<pid>/cgroup`) below `base`, if it is not `base` itself.
fn sub_cgroup(text: &str, base: &Path) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(base).ok()?;
    (!below.as_os_str().is_empty()).then(|| below.to_string_lossy().into_owned())
}

/// Tells the init process to go on. libcontainer's way changes the working directory, because the path is too
/// long for a socket's address; a name below `/proc/self/fd` is short.
fn notify(directory: &Path, id: &str) -> std::io::Result<()> {
    let state = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(state_root(directory).join(id))?;
    let path = format!("/proc/self/fd/{}/notify.sock", state.as_raw_fd());
    UnixStream::connect(path)?.write_all(b"start container")
}

/// The work of the helper that starts a further process.
struct Helper<'a> {
    container: &'a Container,
    exec: &'a str,
    process: ProcessSpec,
    sub_cgroup: Option<String>,
    /// Closed by the agent when the program may run.
    gate: Option<OwnedFd>,
}

impl Helper<'_> {
    fn run(
        mut self,
        program: Option<ProgramEnds>,
        console: Option<PathBuf>,
        status: &StatusPipe,
    ) -> Result<(), String> {
        let directory = &self.container.directory;
        let spec = Spec::load(directory.join("bundle").join("config.json")).map_err(|error| chain(&error))?;
        if self.process.oom_score_adj().is_none() {
            let score = spec.process().as_ref().and_then(ProcessSpec::oom_score_adj);
            self.process.set_oom_score_adj(score);
        }
        let confinement = confine(&mut self.process, &spec);
        let file = directory.join(format!("exec-{}.json", self.exec));
        let text = serde_json::to_vec(&self.process).map_err(|error| error.to_string())?;
        fs::write(&file, text).map_err(|error| error.to_string())?;
        let gate = self.gate.as_ref().map(AsRawFd::as_raw_fd);
        let executor = ProgramExecutor {
            status: status.number(),
            gate,
            confinement,
        };
        let made = with_streams(builder(&self.container.id, &state_root(directory))?, program)
            .with_executor(executor)
            .with_console_socket(console)
            .as_tenant()
            .with_detach(true)
            .as_sibling(true)
            .with_process(Some(&file))
            .with_sub_cgroup(self.sub_cgroup)
            .build();
        let _ = fs::remove_file(&file);
        let pid = made.map_err(|error| chain(&error))?;
        status.send(&Report::Pid(pid.as_raw().unsigned_abs()));
        Ok(())
    }
}

/// What the executor has to do in place of libcontainer, which forgets the filter of additional processes.
fn confine(process: &mut ProcessSpec, spec: &Spec) -> Option<Confinement> {
    let seccomp = spec.linux().as_ref()?.seccomp().clone()?;
    if process.no_new_privileges() == Some(true) {
        return Some(Confinement {
            seccomp,
            capabilities: None,
        });
    }
    // Loading the filter needs the first, dropping capabilities after it the second.
    let needed = [Capability::SysAdmin, Capability::Setpcap];
    let wanted = process.capabilities().clone()?;
    let mut more = wanted.clone();
    let extended = |set: &Option<std::collections::HashSet<Capability>>| {
        Some(set.iter().flatten().copied().chain(needed).collect())
    };
    let (bounding, effective, permitted) = (
        extended(wanted.bounding()),
        extended(wanted.effective()),
        extended(wanted.permitted()),
    );
    more.set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted);
    process.set_capabilities(Some(more));
    Some(Confinement {
        seccomp,
        capabilities: Some(wanted),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sub_cgroups() {
        let base = Path::new("/bulkhead/c");
        assert_eq!(sub_cgroup("0::/bulkhead/c\n", base), None);
        assert_eq!(
            sub_cgroup("1:net:/x\n0::/bulkhead/c/init.scope\n", base).as_deref(),
            Some("init.scope")
        );
        assert_eq!(sub_cgroup("0::/bulkhead/cc/x\n", base), None);
    }

    fn spec(seccomp: bool) -> Spec {
        let filter = if seccomp {
            r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#
        } else {
            ""
        };
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{{{filter}}}}}"#)).unwrap()
    }

    fn process(nnp: bool) -> ProcessSpec {
        let json = format!(
            r#"{{"cwd":"/","args":["x"],"user":{{"uid":0,"gid":0}},"noNewPrivileges":{nnp},
                "capabilities":{{"bounding":["CAP_CHOWN"],"effective":["CAP_CHOWN"],"permitted":["CAP_CHOWN"]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn additional_processes_get_the_filter_and_only_their_capabilities() {
        let mut with_nnp = process(true);
        let confinement = confine(&mut with_nnp, &spec(true)).unwrap();
        assert!(confinement.capabilities.is_none());
        assert_eq!(with_nnp, process(true));

        let mut without = process(false);
        let confinement = confine(&mut without, &spec(true)).unwrap();
        assert_eq!(confinement.capabilities, *process(false).capabilities());
        let effective = without
            .capabilities()
            .clone()
            .unwrap()
            .effective()
            .clone()
            .unwrap();
        assert!(effective.contains(&Capability::SysAdmin) && effective.contains(&Capability::Chown));

        let mut unfiltered = process(false);
        assert!(confine(&mut unfiltered, &spec(false)).is_none());
        assert_eq!(unfiltered, process(false));
    }
}
