use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
#[derive(Args, Debug)]
pub struct Arguments {}
pub fn main(_: &Arguments) -> Result<ExitCode> {
    anyhow::bail!("not yet")
}
