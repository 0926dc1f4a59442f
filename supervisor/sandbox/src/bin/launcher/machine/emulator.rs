//! How QEMU is started: the smallest machine that Linux runs on, with one port and nothing else.

use std::{os::fd::RawFd, path::Path, process::Command};

use super::{Accelerator, PLACE};

/// Why each part is there: without PIT, PIC and clock an emulated machine waits for ever to learn how fast its time runs,
/// and with them it must be told so.
const MACHINE: &str = "microvm,pit=on,pic=on,rtc=on,isa-serial=on,acpi=on";

/// What the kernel is told. It prints nothing but its last words; a panic, and the end of its first process, end the
/// machine. What it would look for and not find, or try out, is left out. The faults of real processors are not those of
/// an emulated one.
const KERNEL: &str = "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic edd=off cryptomgr.notests 8250.nr_uarts=1";
const EMULATED: &str = "no_timer_check tsc=reliable mitigations=off";

/// Clock ticks in a second of most distributions' kernels (`CONFIG_HZ`): of another one, short waits of its drivers are
/// somewhat too long or too short.
const HERTZ: u64 = 250;

/// Translated code, in MiB.
const TRANSLATED: u32 = 64;

/// QEMU's own filter, beside ours: it may start nothing, gain nothing, and change no resources.
const OWN_FILTER: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// One machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    pub(super) accelerator: Accelerator,
    /// Its memory.
    pub(super) bytes: u64,
    /// Ticks of the processor's counter in a millisecond.
    pub(super) khz: u64,
}

/// The command; descriptors are inherited by their numbers.
pub(super) fn command(emulator: &Path, machine: Machine, archive: RawFd, link: RawFd) -> Command {
    let Machine { accelerator, bytes, khz } = machine;
    let (accelerated, cpu, append) = match accelerator {
        // A guest has no guests of its own and no counters of the host: both are the host's kernel at work.
        Accelerator::Kvm => ("kvm".to_owned(), "host,vmx=off,svm=off,pmu=off", KERNEL.to_owned()),
        // Written in one place and executed in another: no page is both.
        Accelerator::Emulation => {
            let pace = format!("tsc_early_khz={khz} lpj={}", khz * 1000 / HERTZ);
            (
                format!("tcg,thread=single,split-wx=on,tb-size={TRANSLATED}"),
                "max",
                format!("{KERNEL} {EMULATED} {pace}"),
            )
        }
    };
    let mut command = Command::new(emulator);
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
        .args(["-sandbox", OWN_FILTER])
        .args(["-machine", MACHINE, "-accel", &accelerated, "-cpu", cpu, "-smp", "1"])
        .args(["-m", &format!("{}M", bytes >> 20)])
        .args(["-kernel", &format!("{PLACE}/0"), "-initrd", &format!("/proc/self/fd/{archive}"), "-append", &append])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .args(["-device", "virtio-serial-device,max_ports=2"])
        .args(["-chardev", &format!("socket,id=link,fd={link}"), "-device", "virtserialport,chardev=link,nr=1"]);
    // QEMU needs none, and the plugin's are for the plugin.
    command.env_clear();
    command
}
