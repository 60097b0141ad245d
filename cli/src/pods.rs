//! The pods of this host, by what their shims keep in the state directory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

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

/// The pod whose id is `pod` or, if there is one only, begins with it: its id and the address of its shim.
///
/// # Errors
/// There is none, or several.
pub fn find(pod: &str, state_dir: &Path) -> anyhow::Result<(String, String)> {
    let mut found = with_file(pod, state_dir, ADDRESS)?;
    if found.iter().any(|(id, _)| id == pod) {
        found.retain(|(id, _)| id == pod);
    }
    match found.as_slice() {
        [] => bail!(
            "No pod of {} has an id that begins with {pod}",
            state_dir.display()
        ),
        [(id, path)] => {
            let address = fs::read_to_string(path)
                .with_context(|| format!("Cannot read the address of pod {id} in {}", path.display()))?;
            Ok((id.clone(), address))
        }
        several => {
            let ids: Vec<_> = several.iter().map(|(id, _)| id.as_str()).collect();
            bail!("{pod} is the beginning of several: {}", ids.join(", "))
        }
    }
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
        assert_eq!(found("a"), ("a".to_owned(), "unix:///a".to_owned()));
        assert_eq!(found("abc").1, "unix:///abc");
        fs::remove_dir_all(state.join("a.1")).unwrap();
        assert_eq!(
            find("a", &state).unwrap_err().to_string(),
            "a is the beginning of several: ab, abc"
        );
        for missing in ["x", "old"] {
            let error = find(missing, &state).unwrap_err().to_string();
            assert!(error.contains("No pod of"), "{error}");
        }
        fs::remove_dir_all(&state).unwrap();
        assert!(find("a", &state).is_err());
    }
}
