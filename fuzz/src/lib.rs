//! What the fuzz targets share.

pub mod driver;
pub mod memory;
#[cfg(feature = "pod")]
pub mod pod;
