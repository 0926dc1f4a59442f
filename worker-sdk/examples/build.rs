//! Compiles each plugin's contract with protox into its own descriptor set, for its bundle, and into Rust; and the contract
//! in the SDK's README, so that the code there is compiled as it stands.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

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
    compile_readme(&out)
}

fn compile_readme(out: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const README: &str = "../README.md";
    println!("cargo::rerun-if-changed={README}");
    let text = fs::read_to_string(README)?;
    let (_, rest) = text.split_once("```proto\n").ok_or("the README shows a contract")?;
    let (contract, _) = rest.split_once("```").ok_or("the contract in the README ends")?;
    let root = out.join("readme");
    fs::create_dir_all(root.join("acme/greeter/v1"))?;
    fs::write(root.join("acme/greeter/v1/greeter.proto"), contract)?;
    let descriptors = protox::compile(["acme/greeter/v1/greeter.proto"], [&root])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
