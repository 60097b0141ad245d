//! What containerd writes to the standard input of `start`.

use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

/// What can be learnt from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bootstrap {
    /// Configuration file named by the runtime's options.
    pub config_path: Option<PathBuf>,
    /// containerd's ttrpc socket (2.3 and later).
    pub ttrpc_address: Option<String>,
    /// Directory for the shim's socket (2.3 and later).
    pub socket_dir: Option<PathBuf>,
}

/// Type of the options that name a configuration file. Older containerd versions have a longer name.
const OPTIONS: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// Parses the input: nothing, an `Any` with the options, or (2.3 and later) `BootstrapParams`, which is
/// told by its first two fields being this task's id and namespace.
#[must_use]
pub fn parse(input: &[u8], id: &str, namespace: &str) -> Bootstrap {
    if input.is_empty() {
        return Bootstrap::default();
    }
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && params.instance_id == id
        && params.namespace == namespace
    {
        let options = params
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref());
        return Bootstrap {
            config_path: options.into_iter().find_map(config_path),
            ttrpc_address: Some(params.containerd_ttrpc_address).filter(|address| !address.is_empty()),
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from),
        };
    }
    Bootstrap {
        config_path: Any::parse_from_bytes(input).ok().as_ref().and_then(config_path),
        ..Bootstrap::default()
    }
}

/// The `config_path` of runtime options; any other type of options has none.
#[must_use]
pub fn config_path(options: &Any) -> Option<PathBuf> {
    /// Field 2, length-delimited.
    const CONFIG_PATH: u32 = (2 << 3) | 2;
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if !OPTIONS.contains(&name) {
        return None;
    }
    let mut stream = CodedInputStream::from_bytes(&options.value);
    while let Ok(Some(tag)) = stream.read_raw_tag_or_eof() {
        if tag == CONFIG_PATH {
            let path = stream.read_string().ok()?;
            return Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty());
        }
        let wire_type = protobuf::rt::WireType::new(tag & 7)?;
        stream.skip_field(wire_type).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use containerd_shim_protos::bootstrap_api::Extension;
    use proptest::prelude::*;

    use super::*;

    fn options(path: &str) -> Any {
        let length = u8::try_from(path.len()).unwrap();
        let mut value = vec![0x12, length];
        value.extend(path.as_bytes());
        Any {
            type_url: OPTIONS[0].into(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn nothing_means_defaults() {
        assert_eq!(parse(b"", "id", "ns"), Bootstrap::default());
    }

    #[test]
    fn options_name_a_file() {
        let input = options("/etc/x.json").write_to_bytes().unwrap();
        assert_eq!(
            parse(&input, "id", "ns").config_path.unwrap(),
            PathBuf::from("/etc/x.json")
        );
    }

    #[test]
    fn other_options_are_ignored() {
        let other = Any {
            type_url: "containerd.runc.v1.Options".into(),
            ..options("/x")
        };
        assert_eq!(
            parse(&other.write_to_bytes().unwrap(), "id", "ns"),
            Bootstrap::default()
        );
    }

    #[test]
    fn parameters_are_told_from_options_by_id_and_namespace() {
        let params = BootstrapParams {
            instance_id: "id".into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            extensions: vec![Extension {
                value: Some(options("/c.json")).into(),
                ..Extension::default()
            }],
            ..BootstrapParams::default()
        };
        let input = params.write_to_bytes().unwrap();
        let expected = Bootstrap {
            config_path: Some("/c.json".into()),
            ttrpc_address: Some("/run/c.ttrpc".into()),
            socket_dir: Some("/run/s".into()),
        };
        assert_eq!(parse(&input, "id", "ns"), expected);
        // The same bytes for another task are no parameters.
        assert_eq!(parse(&input, "other", "ns"), Bootstrap::default());
    }

    /// containerd 2.3 and later first try to read the reply of `start` as a message, then as JSON.
    #[test]
    fn a_plain_address_is_not_taken_for_another_reply() {
        use containerd_shim_protos::bootstrap_api::BootstrapResult;
        let address =
            "unix:///run/containerd/s/cfa94b04d543b3f64f78eff8125c7a7cd0903173f673d87367be72ff09fc92c2";
        assert!(BootstrapResult::parse_from_bytes(address.as_bytes()).is_err());
        assert!(serde_json::from_str::<serde_json::Value>(address).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(input in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&input, "id", "ns");
        }

        /// An `Any` is never taken for parameters, whatever its type.
        #[test]
        fn options_are_never_parameters(url in "[a-z.]{1,20}", value in proptest::collection::vec(any::<u8>(), 0..40)) {
            let any = Any { type_url: url.clone(), value, ..Any::default() };
            let parsed = parse(&any.write_to_bytes().unwrap(), "id", "ns");
            prop_assert_eq!(parsed.ttrpc_address, None);
            prop_assert_eq!(parsed.socket_dir, None);
        }
    }
}
