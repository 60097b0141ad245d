//! Annotations that tell what a whole pod asks for.

use std::collections::HashMap;

use serde::Deserialize;

use super::demand::{Demand, set};

/// containerd's, one for each number (since 1.6); zero says nothing.
const CONTAINERD: &str = "io.kubernetes.cri.sandbox-";

/// CRI-O's, the resources of CRI as JSON.
const CRI_O: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// `LinuxContainerResources` of CRI as far as it is about size.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
}

/// What the annotations say; `None` if nothing. A value that is no number says nothing either.
pub(super) fn read(annotations: &HashMap<String, String>) -> Option<Demand> {
    let number = |name: &str| -> i64 {
        annotations
            .get(&format!("{CONTAINERD}{name}"))
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    let resources = match annotations.get(CRI_O) {
        Some(json) => serde_json::from_str(json).unwrap_or_default(),
        None => Resources {
            cpu_period: number("cpu-period"),
            cpu_quota: number("cpu-quota"),
            cpu_shares: number("cpu-shares"),
            memory_limit_in_bytes: number("memory"),
        },
    };
    let mut demand = Demand::default();
    set(&mut demand.quota, resources.cpu_quota);
    set(&mut demand.period, resources.cpu_period);
    set(&mut demand.shares, resources.cpu_shares);
    set(&mut demand.memory, resources.memory_limit_in_bytes);
    let says = demand.quota.is_some() || demand.memory.is_some();
    says.then_some(demand)
}
