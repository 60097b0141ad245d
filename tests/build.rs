//! Generates the messages of the Container Runtime Interface and of the Node Resource Interface from `proto/`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    for name in ["cri", "nri"] {
        let source = format!("proto/{name}.proto");
        println!("cargo:rerun-if-changed={source}");
        ttrpc_codegen::Codegen::new()
            .inputs([&source])
            .include("proto")
            .out_dir(&out)
            .rust_protobuf()
            // No reflection: half of the code.
            .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().lite_runtime(true))
            .run()?;
        // The generated file begins with inner attributes and comments, which `include!` does not take.
        let path = out.join(format!("{name}.rs"));
        let text = std::fs::read_to_string(&path)?;
        let body: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        std::fs::write(&path, body.join("\n"))?;
    }
    Ok(())
}
