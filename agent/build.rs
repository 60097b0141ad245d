//! Links the agent at fixed addresses.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A position-independent program relocates itself when it starts: for this one 17,000 words in 72 pages,
    // touched and copied in every guest before `main`. What is fixed stays in the shared image.
    println!("cargo:rustc-link-arg-bins=-static");
    println!("cargo:rustc-link-arg-bins=-no-pie");
}
