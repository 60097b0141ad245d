//! Generates the messages of `proto/containerd.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/containerd.proto");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    ttrpc_codegen::Codegen::new()
        .inputs(["proto/containerd.proto"])
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        // No reflection: half of the code.
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().lite_runtime(true))
        .run()?;
    // The generated file begins with inner attributes and comments, which `include!` does not take.
    let path = out.join("containerd.rs");
    let text = std::fs::read_to_string(&path)?;
    let body: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    std::fs::write(&path, body.join("\n"))?;
    Ok(())
}
