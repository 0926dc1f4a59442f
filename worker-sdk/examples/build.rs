//! Compiles each plugin's contract with protox into its own descriptor set, for its bundle, and into Rust.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const PLUGINS: [&str; 3] = ["thumbnailer", "markdown", "gallery"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    for plugin in PLUGINS {
        let file = format!("plugvisor/examples/{plugin}/v1/{plugin}.proto");
        let descriptors = protox::compile([file], ["proto"])?;
        fs::write(out.join(format!("{plugin}.binpb")), descriptors.encode_to_vec())?;
        tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    }
    Ok(())
}
