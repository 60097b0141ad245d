//! The pods of this host, by what their shims keep in the state directory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bulkhead_sandbox::snapshot::{ORIGIN, Origin};

/// File of a pod's state with the address of its shim.
pub const ADDRESS: &str = "address";

/// Ids of pods that have `file` in their state directory, with that file; those whose id begins with `prefix`.
///
/// # Errors
/// The directory cannot be read.
pub fn with_file(prefix: &str, state_dir: &Path, file: &str) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for name in names(state_dir)? {
        // `<id>.<hash>`
        if let Some((id, _)) = name.rsplit_once('.') {
            let path = state_dir.join(&name).join(file);
            if id.starts_with(prefix) && path.exists() {
                found.push((id.to_owned(), path));
            }
        }
    }
    Ok(found)
}

/// The one of `found` whose id is `pod` or, if there is one only, begins with it. `state_dir` is for the error.
///
/// # Errors
/// There is none, or several: two namespaces can have a pod of the same id.
pub fn choose(
    pod: &str,
    mut found: Vec<(String, PathBuf)>,
    state_dir: &Path,
) -> anyhow::Result<(String, PathBuf)> {
    if found.iter().any(|(id, _)| id == pod) {
        found.retain(|(id, _)| id == pod);
    }
    match found.as_slice() {
        [] => bail!(
            "No pod of {} has an id that begins with {pod}",
            state_dir.display()
        ),
        [one] => Ok(one.clone()),
        several => {
            let several: Vec<_> = several
                .iter()
                .map(|(id, path)| format!("{id} ({})", path.display()))
                .collect();
            bail!("{pod} is the beginning of several:\n{}", several.join("\n"))
        }
    }
}

/// A pod that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// Address of its shim.
    pub address: String,
    /// Its state directory.
    directory: PathBuf,
}

impl Pod {
    /// Who has made it.
    ///
    /// # Errors
    /// The file that says so cannot be used.
    pub fn origin(&self) -> anyhow::Result<Origin> {
        let path = self.directory.join(ORIGIN);
        let failed = || format!("Cannot tell from {} who has made pod {}", path.display(), self.id);
        let json = fs::read(&path).with_context(failed)?;
        serde_json::from_slice(&json).with_context(failed)
    }
}

/// The pod whose id is `pod` or, if there is one only, begins with it.
///
/// # Errors
/// There is none, or several.
pub fn find(pod: &str, state_dir: &Path) -> anyhow::Result<Pod> {
    let (id, path) = choose(pod, with_file(pod, state_dir, ADDRESS)?, state_dir)?;
    let address = fs::read_to_string(&path)
        .with_context(|| format!("Cannot read the address of pod {id} in {}", path.display()))?;
    let directory = path.parent().unwrap_or(state_dir).to_owned();
    Ok(Pod {
        id,
        address,
        directory,
    })
}

/// Names in a directory, sorted; none if it does not exist.
///
/// # Errors
/// It cannot be read.
pub fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("Cannot read {}", directory.display()))?,
    };
    let mut names: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pod_is_found_by_its_id_before_those_that_begin_with_it() {
        let state = std::env::temp_dir().join(format!("bulkhead-cli-pods-{}", std::process::id()));
        let _ = fs::remove_dir_all(&state);
        for (name, address) in [
            ("a.1", "unix:///a"),
            ("ab.2", "unix:///ab"),
            ("abc.3", "unix:///abc"),
        ] {
            fs::create_dir_all(state.join(name)).unwrap();
            fs::write(state.join(name).join(ADDRESS), address).unwrap();
        }
        fs::create_dir_all(state.join("old.4")).unwrap();
        let found = |pod: &str| find(pod, &state).unwrap();
        assert_eq!(
            found("a"),
            Pod {
                id: "a".to_owned(),
                address: "unix:///a".to_owned(),
                directory: state.join("a.1"),
            }
        );
        assert_eq!(found("abc").address, "unix:///abc");
        let unknown = found("a").origin().unwrap_err();
        assert!(unknown.to_string().contains("a.1/origin.json"), "{unknown}");
        let origin = Origin {
            manager: "/run/c.sock".into(),
            namespace: "n".to_owned(),
            pod: "a".to_owned(),
        };
        fs::write(
            state.join("a.1").join(ORIGIN),
            serde_json::to_vec(&origin).unwrap(),
        )
        .unwrap();
        assert_eq!(found("a").origin().unwrap(), origin);
        fs::remove_dir_all(state.join("a.1")).unwrap();
        let several = find("a", &state).unwrap_err().to_string();
        assert!(
            several.starts_with("a is the beginning of several:\nab (/") && several.contains("\nabc (/"),
            "{several}"
        );
        for missing in ["x", "old"] {
            let error = find(missing, &state).unwrap_err().to_string();
            assert!(error.contains("No pod of"), "{error}");
        }
        fs::remove_dir_all(&state).unwrap();
        assert!(find("a", &state).is_err());
    }
}
