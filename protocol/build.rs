//! Generates the agent's messages and ttrpc service from `proto/agent.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    #[cfg(feature = "agent")]
    generate()?;
    Ok(())
}

#[cfg(feature = "agent")]
fn generate() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    ttrpc_codegen::Codegen::new()
        .inputs(["proto/agent.proto"])
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generated files begin with inner attributes and comments, which `include!` does not take.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path)?;
        let body: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        std::fs::write(&path, body.join("\n"))?;
    }
    Ok(())
}
