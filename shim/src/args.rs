//! The command line containerd gives a shim: Go's flag package, options first, the action last.

use bulkhead_sandbox::snapshot::Origin;

/// What the shim is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a sandbox's server, or name the one a container belongs to.
    Start,
    /// Clean up after a task.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
}

/// Parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// Task id.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// Path of containerd's socket.
    pub address: String,
    /// Bundle directory; `start` uses the working directory instead.
    pub bundle: String,
    /// Whether containerd logs debug messages.
    pub debug: bool,
}

impl Args {
    /// Who asks for the sandbox of this id.
    #[must_use]
    pub fn origin(&self) -> Origin {
        Origin {
            manager: self.address.clone().into(),
            namespace: self.namespace.clone(),
            pod: self.id.clone(),
        }
    }
}

/// Why the command line is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An option is not known.
    #[error("Unknown option {0}")]
    Unknown(String),
    /// An option has no value.
    #[error("Option -{0} needs a value")]
    NoValue(String),
    /// There is no action, or one that is not known.
    #[error("Action {0:?} is not known (start and delete are)")]
    Action(String),
    /// A required option is missing.
    #[error("Option -{0} is required")]
    Required(&'static str),
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// [`ArgsError`].
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Args, ArgsError> {
    let mut args = Args {
        action: Action::Start,
        id: String::new(),
        namespace: String::new(),
        address: String::new(),
        bundle: String::new(),
        debug: false,
    };
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let Some(option) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            args.action = match argument.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                _ => return Err(ArgsError::Action(argument)),
            };
            return check(args);
        };
        let (name, inline) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (option, None),
        };
        match name {
            "debug" => args.debug = inline.is_none_or(|value| value == "true" || value == "1"),
            "info" => {
                return Ok(Args {
                    action: Action::Info,
                    ..args
                });
            }
            "v" | "version" => {
                return Ok(Args {
                    action: Action::Version,
                    ..args
                });
            }
            "id" | "namespace" | "address" | "bundle" | "publish-binary" | "socket" => {
                let value = inline
                    .or_else(|| arguments.next())
                    .ok_or_else(|| ArgsError::NoValue(name.to_owned()))?;
                match name {
                    "id" => args.id = value,
                    "namespace" => args.namespace = value,
                    "address" => args.address = value,
                    "bundle" => args.bundle = value,
                    // Events go over ttrpc; the socket's place is computed.
                    _ => {}
                }
            }
            _ => return Err(ArgsError::Unknown(argument)),
        }
    }
    Err(ArgsError::Action(String::new()))
}

fn check(args: Args) -> Result<Args, ArgsError> {
    if args.id.is_empty() {
        return Err(ArgsError::Required("id"));
    }
    if args.namespace.is_empty() {
        return Err(ArgsError::Required("namespace"));
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn run(line: &str) -> Result<Args, ArgsError> {
        parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn containerds_command_lines_parse() {
        let args = run(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id x -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("k8s.io", "x"));
        assert_eq!(args.address, "/run/c.sock");
        let origin = serde_json::to_string(&args.origin()).unwrap();
        assert_eq!(
            origin,
            r#"{"manager":"/run/c.sock","namespace":"k8s.io","pod":"x"}"#
        );
        assert!(args.debug);
        let args = run("-namespace n -address a -publish-binary b -id x -bundle /b delete").unwrap();
        assert_eq!(
            (args.action, args.bundle.as_str(), args.debug),
            (Action::Delete, "/b", false)
        );
        assert_eq!(run("-info").unwrap().action, Action::Info);
        assert_eq!(run("--id=x -namespace=n start").unwrap().id, "x");
    }

    #[test]
    fn bad_command_lines_are_refused() {
        assert_eq!(run("-id x -namespace n"), Err(ArgsError::Action(String::new())));
        assert_eq!(
            run("-id x -namespace n run"),
            Err(ArgsError::Action("run".into()))
        );
        assert_eq!(run("-namespace n start"), Err(ArgsError::Required("id")));
        assert_eq!(run("-wrong start"), Err(ArgsError::Unknown("-wrong".into())));
        assert_eq!(run("-id"), Err(ArgsError::NoValue("id".into())));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(words in proptest::collection::vec("[-a-z=]{0,8}", 0..8)) {
            let _ = parse(words);
        }
    }
}
