//! `bulkhead-agent`: init process and container runtime of a Bulkhead guest.
//!
//! The agent is PID 1 of a guest with nothing else in its image. It dials the host on vsock port 1024 and serves
//! `agent.proto` on that connection, and on the next one when it ends. It has one thread: what may block runs in helper processes ([`job`]).

pub mod cgroup;
pub mod checkpoint;
pub mod connection;
pub mod container;
pub mod error;
pub mod events;
pub mod fd;
pub mod gate;
pub mod init;
pub mod job;
pub mod kmsg;
pub mod network;
pub mod power;
pub mod processors;
pub mod reaper;
pub mod resume;
pub mod sandbox;
pub mod service;
pub mod storage;
pub mod streams;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::create_agent;
use bulkhead_protocol::ports;
use tokio::sync::Notify;

use crate::container::Containers;
use crate::error::chain;
use crate::gate::Gate;
use crate::init::InitError;
use crate::reaper::Reaper;
use crate::service::{BootTimes, Service, uptime_us};
use crate::streams::{Host, StreamError};

/// Time for the reply to `Shutdown` to leave the guest: the kernel sends vsock packets from a work queue, and
/// nothing tells when the host has them.
const LAST_WORDS: Duration = Duration::from_millis(5);

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The event loop.
    #[error("cannot start the event loop")]
    Runtime(#[source] io::Error),
    /// The guest.
    #[error("cannot set up the guest")]
    Init(#[source] InitError),
    /// The host.
    #[error("cannot reach the host")]
    Dial(#[source] StreamError),
    /// The signal handler.
    #[error("cannot wait for children")]
    Children(#[source] io::Error),
    /// The server.
    #[error("cannot serve")]
    Serve(#[source] ttrpc::Error),
}

/// Serves the host until it asks for the end of the guest.
///
/// `setup` prepares the guest; it runs while the connection is being made.
///
/// # Errors
/// Something fails before the first request.
pub fn serve(
    host: Host,
    main_uptime_us: u64,
    setup: impl FnOnce() -> Result<(), InitError>,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    runtime.block_on(async {
        // The host answers while the guest is set up.
        let pending = host.start_dial(ports::AGENT).map_err(ServeError::Dial)?;
        setup().map_err(ServeError::Init)?;
        let connection = streams::finish_dial(pending, ports::AGENT)
            .await
            .map_err(ServeError::Dial)?;
        let reaper = Reaper::default();
        reaper.start().map_err(ServeError::Children)?;
        let shutdown = Arc::new(Notify::new());
        let gate = Arc::new(Gate::default());
        let containers = Containers::new(reaper, host.clone());
        let boot = BootTimes {
            main: main_uptime_us,
            ready: uptime_us(),
        };
        let service = Service::new(containers, boot, Arc::clone(&gate), Arc::clone(&shutdown));
        let methods = gate::guard(create_agent(Arc::new(service)), &gate);
        let mut server = ttrpc::r#async::Server::new()
            .add_listener(connection::successive(connection, host, gate))
            .register_service(methods);
        server.start().await.map_err(ServeError::Serve)?;
        shutdown.notified().await;
        tokio::time::sleep(LAST_WORDS).await;
        Ok(())
    })
}

/// PID 1: sets the guest up, serves, and switches the guest off, whatever happens.
pub fn run() {
    let main = uptime_us();
    // The program may have to exist before anything can be logged.
    let descriptors = init::standard_descriptors();
    kmsg::init();
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    let result = descriptors
        .map_err(ServeError::Init)
        .and_then(|()| serve(Host::Vsock, main, init::setup));
    if let Err(error) = result {
        log::error!("{}", chain(&error));
    }
    power::off();
}
