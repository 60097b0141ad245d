#![allow(clippy::unwrap_used)]

use super::*;

fn annotate(pairs: &[(&str, &str)]) -> Result<Configuration, ConfigError> {
    let map: BTreeMap<String, String> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let mut configuration = Configuration::default();
    configuration.apply_annotations(&map).map(|()| configuration)
}

#[test]
fn defaults_are_valid() {
    Configuration::default().validate().unwrap();
}

#[test]
fn unknown_keys_are_refused() {
    let error = serde_json::from_str::<Configuration>(r#"{"vcpu": 1}"#).unwrap_err();
    assert!(error.to_string().contains("vcpu"), "{error}");
}

#[test]
fn a_partial_file_keeps_the_other_defaults() {
    let configuration: Configuration = serde_json::from_str(r#"{"vcpus": 4}"#).unwrap();
    assert_eq!(
        configuration,
        Configuration {
            vcpus: 4,
            ..Configuration::default()
        }
    );
}

#[test]
fn the_kernel_may_carry_frames_unless_it_is_told_not_to() {
    assert!(Configuration::default().vhost_net);
    let without: Configuration = serde_json::from_str(r#"{"vhost_net": false}"#).unwrap();
    assert!(!without.vhost_net);
}

#[test]
fn errors_name_field_and_value() {
    let zero = Configuration {
        vcpus: 0,
        ..Configuration::default()
    };
    assert_eq!(
        zero.validate().unwrap_err().to_string(),
        "vcpus = 0 is not valid: 1 to 32 is allowed"
    );
    let small = Configuration {
        memory_mib: 63,
        ..Configuration::default()
    };
    assert!(
        small
            .validate()
            .unwrap_err()
            .to_string()
            .starts_with("memory_mib = 63 ")
    );
    let relative = Configuration {
        kernel: "vmlinux".into(),
        ..Configuration::default()
    };
    assert!(
        relative
            .validate()
            .unwrap_err()
            .to_string()
            .starts_with("kernel = vmlinux ")
    );
    let newline = Configuration {
        kernel_parameters: "a\nb".into(),
        ..Configuration::default()
    };
    assert!(newline.validate().is_err());
}

#[test]
fn annotations_change_the_sandbox() {
    let configuration = annotate(&[
        ("io.katacontainers.config.hypervisor.default_vcpus", "3"),
        ("io.katacontainers.config.hypervisor.default_memory", "512"),
        ("io.katacontainers.config.hypervisor.kernel_params", "debug"),
        ("io.kubernetes.cri.container-type", "sandbox"),
    ])
    .unwrap();
    assert_eq!((configuration.vcpus, configuration.memory_mib), (3, 512));
    assert_eq!(configuration.kernel_parameters, "debug");
}

#[test]
fn bad_annotations_are_refused_by_name() {
    for (name, text) in [
        ("io.katacontainers.config.hypervisor.default_vcpus", "0"),
        ("io.katacontainers.config.hypervisor.default_vcpus", "33"),
        ("io.katacontainers.config.hypervisor.default_vcpus", "-1"),
        ("io.katacontainers.config.hypervisor.default_memory", "63"),
        ("io.katacontainers.config.hypervisor.default_memory", "lots"),
        ("io.katacontainers.config.hypervisor.path", "/bin/true"),
        ("io.katacontainers.config.runtime.sandbox_cgroup_only", "true"),
    ] {
        let error = annotate(&[(name, text)]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_annotation_that_is_not_enabled_is_refused() {
    let mut configuration = Configuration {
        enable_annotations: vec![],
        ..Configuration::default()
    };
    let map = BTreeMap::from([(format!("{HYPERVISOR_PREFIX}default_vcpus"), "1".to_owned())]);
    assert!(matches!(
        configuration.apply_annotations(&map),
        Err(ConfigError::Annotation { .. })
    ));
}
