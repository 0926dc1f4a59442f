//! The virtual machine as a process: started, listened to, and ended in time.

use std::fs;
use std::io::BufReader;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::image::Image;
use super::report::{self, Message};

/// Two processors and memory for the root, which lives in it, and for what runs. Emulated on every host: so the lane is
/// the same with and without hardware help, and needs no permission for a device. Without the two features that promise that
/// copying byte by byte is fast, which emulated it is not: the kernel then copies words.
const HARDWARE: [&str; 9] =
    ["-machine", "q35", "-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "max,-erms,-fsrm", "-no-reboot"];

/// Its memory.
pub(super) const MEMORY_MIB: u32 = 3072;

/// The console goes to a file, the report to our pipe; there is no network and no display.
const QUIET: [&str; 6] = ["-display", "none", "-monitor", "none", "-nic", "none"];

/// A panic reboots, and a reboot ends the machine. What a test does to `/sys/kernel/mm` or to swap stays in it. Addresses are
/// not chosen at random: what the emulator has translated holds for one address, and most of what a short-lived process
/// takes would be that its libraries are translated anew (measured: 100 starts of /bin/true 0.7 s instead of 2.9 s).
const KERNEL: &str = "console=ttyS0 panic=-1 quiet systemd.show_status=error norandmaps";

/// How many lines of the console are shown.
const TAIL: usize = 40;

/// A running machine. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    process: Child,
    report: Option<ChildStdout>,
}

impl Machine {
    /// Starts it.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub(super) fn start(image: &Image, initramfs: &Path, console: &Path) -> anyhow::Result<Self> {
        let mut serial = std::ffi::OsString::from("file:");
        serial.push(console);
        let mut process = Command::new("qemu-system-x86_64")
            .args(HARDWARE)
            .args(["-m", &MEMORY_MIB.to_string()])
            .args(QUIET)
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", KERNEL])
            .arg("-serial")
            .arg(serial)
            .args(["-chardev", "stdio,id=report,signal=off", "-serial", "chardev:report"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let report = process.stdout.take();
        Ok(Self { process, report })
    }

    /// Listens until the machine has powered itself off.
    ///
    /// # Errors
    /// When it does not in time, says what is no message, or QEMU ends badly.
    pub(super) fn run(mut self, longest: Duration, mut take: impl FnMut(Message)) -> anyhow::Result<()> {
        let report = self.report.take().context("QEMU has no standard output")?;
        let deadline = Instant::now() + longest;
        let (sender, messages) = mpsc::channel();
        let reader = thread::spawn(move || report::read(BufReader::new(report), |message| drop(sender.send(message))));
        loop {
            match messages.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(message) => take(message),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("the machine was not done in {longest:?} and was ended"),
            }
        }
        match reader.join() {
            Ok(read) => read?,
            Err(_) => bail!("reading the guest's serial line ended in a panic"),
        }
        let status = self.process.wait().context("cannot wait for QEMU")?;
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Our own child; of one that has ended and was waited for, this does nothing.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The end of the console, for messages.
pub(super) fn tail(console: &Path) -> String {
    let text = fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text = text.unwrap_or_else(|error| format!("(no console: {error})"));
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
