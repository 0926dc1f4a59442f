//! Builds the first process of a guest (`guest/`), which the launcher has within it: static and by the compiler alone,
//! because cargo links all programs of a workspace in one way.
//!
//! Where the host has no static C library, nothing is built: the launcher then says of the level VM that it lacks this.

use std::{env, fs, path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest = out.join("guest");
    if let Err(why) = build(&guest) {
        println!("cargo::warning=the level VM is left out: its guest's first process cannot be built: {why}");
        fs::write(&guest, []).expect("OUT_DIR can be written");
    }
}

fn build(to: &PathBuf) -> Result<(), String> {
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err("guests are of x86-64".to_owned());
    }
    let of = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let mut rustc = Command::new(of("RUSTC")?);
    rustc.args(["--edition", "2024", "--crate-name", "plugvisor_guest", "--target", &of("TARGET")?]);
    rustc.args(["-C", "target-feature=+crt-static", "-C", "relocation-model=static", "-C", "panic=abort"]);
    rustc.args(["-C", "opt-level=s", "-C", "strip=symbols", "--cap-lints", "allow"]);
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let done = rustc.arg("guest/main.rs").arg("-o").arg(to).output().map_err(|error| error.to_string())?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let first = said.lines().find(|line| line.starts_with("error")).unwrap_or("the compiler failed").to_owned();
    Err(format!("{first} (it needs a static C library: libc6-dev, or glibc-static)"))
}
