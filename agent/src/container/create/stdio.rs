//! Standard streams of a process in the making: pipes, or a terminal that libcontainer makes.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use tokio::net::UnixListener;

use crate::container::Containers;
use crate::error::Error;
use crate::fd::AsyncFile;
use crate::streams::{self, HostEnds, ProgramEnds, StreamError};

impl Containers {
    /// What a process's standard streams are made of.
    pub(in crate::container) fn stdio(
        &self,
        host: HostEnds,
        wanted: &proto::Streams,
        user: (u32, u32),
    ) -> Result<Stdio, Error> {
        if wanted.terminal {
            let console = Console::new(self.socket_path(), host, user.0, (wanted.width, wanted.height))?;
            return Ok(Stdio {
                program: None,
                copies: None,
                console: Some(console),
            });
        }
        let (program, copies) = streams::pipes(host, user).map_err(Error::Streams)?;
        Ok(Stdio {
            program: Some(program),
            copies: Some(copies),
            console: None,
        })
    }
}

/// The parts of a process's standard streams.
#[derive(Debug)]
pub(in crate::container) struct Stdio {
    /// For the program; the helper takes them.
    pub program: Option<ProgramEnds>,
    /// Copies between pipes and host.
    pub copies: Option<streams::Copies>,
    /// In place of both, with a terminal.
    pub console: Option<Console>,
}

/// The socket over which libcontainer sends the master of a terminal it has made.
#[derive(Debug)]
pub(in crate::container) struct Console {
    pub path: PathBuf,
    listener: UnixListener,
    host: HostEnds,
    user: u32,
    size: (u32, u32),
}

impl Console {
    fn new(path: PathBuf, host: HostEnds, user: u32, size: (u32, u32)) -> Result<Self, Error> {
        let listener = UnixListener::bind(&path).map_err(Error::io("cannot make the console socket"))?;
        Ok(Self {
            path,
            listener,
            host,
            user,
            size,
        })
    }

    /// Receives the terminal and joins the host's streams to it.
    pub(in crate::container) async fn finish(
        mut self,
        limit: Duration,
    ) -> Result<(AsyncFile, streams::Copies), Error> {
        let fail = |source| Error::Streams(StreamError::Terminal(source));
        let receive = async {
            let (connection, _) = self.listener.accept().await.map_err(fail)?;
            streams::receive_master(&connection).await.map_err(Error::Streams)
        };
        let master = match tokio::time::timeout(limit, receive).await {
            Ok(master) => master?,
            Err(_) => return Err(fail(nix::errno::Errno::ETIMEDOUT.into())),
        };
        let master = streams::prepare_master(master, self.user, self.size).map_err(Error::Streams)?;
        let host = std::mem::take(&mut self.host);
        let copies = streams::terminal(host, &master);
        Ok((master, copies))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
