//! Names of system calls to this machine's numbers, for the names that the policy files use.
//!
//! `libc` has the numbers but no names; a name that is missing here stops the launcher, so the list cannot fall behind.

/// The number of the system call; `None` when this architecture does not have it.
pub(crate) fn number(name: &str) -> Result<Option<i64>, ()> {
    let common = match name {
        "mount" => libc::SYS_mount,
        "sendto" => libc::SYS_sendto,
        "sendmsg" => libc::SYS_sendmsg,
        "sendmmsg" => libc::SYS_sendmmsg,
        "umount2" => libc::SYS_umount2,
        "pivot_root" => libc::SYS_pivot_root,
        "chroot" => libc::SYS_chroot,
        "fsopen" => libc::SYS_fsopen,
        "fsconfig" => libc::SYS_fsconfig,
        "fsmount" => libc::SYS_fsmount,
        "fspick" => libc::SYS_fspick,
        "move_mount" => libc::SYS_move_mount,
        "open_tree" => libc::SYS_open_tree,
        "mount_setattr" => libc::SYS_mount_setattr,
        "swapon" => libc::SYS_swapon,
        "swapoff" => libc::SYS_swapoff,
        "quotactl" => libc::SYS_quotactl,
        "quotactl_fd" => libc::SYS_quotactl_fd,
        "setns" => libc::SYS_setns,
        "unshare" => libc::SYS_unshare,
        "clone" => libc::SYS_clone,
        "clone3" => libc::SYS_clone3,
        "ptrace" => libc::SYS_ptrace,
        "process_vm_readv" => libc::SYS_process_vm_readv,
        "process_vm_writev" => libc::SYS_process_vm_writev,
        "process_madvise" => libc::SYS_process_madvise,
        "kcmp" => libc::SYS_kcmp,
        "pidfd_getfd" => libc::SYS_pidfd_getfd,
        "bpf" => libc::SYS_bpf,
        "perf_event_open" => libc::SYS_perf_event_open,
        "userfaultfd" => libc::SYS_userfaultfd,
        "lookup_dcookie" => libc::SYS_lookup_dcookie,
        "fanotify_init" => libc::SYS_fanotify_init,
        "add_key" => libc::SYS_add_key,
        "request_key" => libc::SYS_request_key,
        "keyctl" => libc::SYS_keyctl,
        "io_setup" => libc::SYS_io_setup,
        "io_uring_setup" => libc::SYS_io_uring_setup,
        "io_uring_enter" => libc::SYS_io_uring_enter,
        "io_uring_register" => libc::SYS_io_uring_register,
        "open_by_handle_at" => libc::SYS_open_by_handle_at,
        "name_to_handle_at" => libc::SYS_name_to_handle_at,
        "init_module" => libc::SYS_init_module,
        "finit_module" => libc::SYS_finit_module,
        "delete_module" => libc::SYS_delete_module,
        "kexec_load" => libc::SYS_kexec_load,
        "kexec_file_load" => libc::SYS_kexec_file_load,
        "reboot" => libc::SYS_reboot,
        "shmget" => libc::SYS_shmget,
        "shmat" => libc::SYS_shmat,
        "shmctl" => libc::SYS_shmctl,
        "shmdt" => libc::SYS_shmdt,
        "semget" => libc::SYS_semget,
        "semop" => libc::SYS_semop,
        "semctl" => libc::SYS_semctl,
        "semtimedop" => libc::SYS_semtimedop,
        "msgget" => libc::SYS_msgget,
        "msgsnd" => libc::SYS_msgsnd,
        "msgrcv" => libc::SYS_msgrcv,
        "msgctl" => libc::SYS_msgctl,
        "mq_open" => libc::SYS_mq_open,
        "mq_unlink" => libc::SYS_mq_unlink,
        "mq_timedsend" => libc::SYS_mq_timedsend,
        "mq_timedreceive" => libc::SYS_mq_timedreceive,
        "mq_notify" => libc::SYS_mq_notify,
        "mq_getsetattr" => libc::SYS_mq_getsetattr,
        "personality" => libc::SYS_personality,
        "settimeofday" => libc::SYS_settimeofday,
        "clock_settime" => libc::SYS_clock_settime,
        "clock_adjtime" => libc::SYS_clock_adjtime,
        "adjtimex" => libc::SYS_adjtimex,
        "sethostname" => libc::SYS_sethostname,
        "setdomainname" => libc::SYS_setdomainname,
        "syslog" => libc::SYS_syslog,
        "acct" => libc::SYS_acct,
        "vhangup" => libc::SYS_vhangup,
        "nfsservctl" => libc::SYS_nfsservctl,
        "socket" => libc::SYS_socket,
        "socketpair" => libc::SYS_socketpair,
        "ioctl" => libc::SYS_ioctl,
        "prlimit64" => libc::SYS_prlimit64,
        "prctl" => libc::SYS_prctl,
        "memfd_create" => libc::SYS_memfd_create,
        // Newer than the libc crate's table; the numbers of new calls are the same on every architecture.
        "open_tree_attr" => 467,
        _ => return only_here(name),
    };
    Ok(Some(common))
}

/// Calls that only older architectures have.
#[cfg(target_arch = "x86_64")]
fn only_here(name: &str) -> Result<Option<i64>, ()> {
    Ok(Some(match name {
        "fork" => libc::SYS_fork,
        "vfork" => libc::SYS_vfork,
        "iopl" => libc::SYS_iopl,
        "ioperm" => libc::SYS_ioperm,
        "modify_ldt" => libc::SYS_modify_ldt,
        "uselib" => libc::SYS_uselib,
        "ustat" => libc::SYS_ustat,
        "sysfs" => libc::SYS_sysfs,
        "_sysctl" => libc::SYS__sysctl,
        _ => return Err(()),
    }))
}

#[cfg(not(target_arch = "x86_64"))]
fn only_here(name: &str) -> Result<Option<i64>, ()> {
    const OLD: [&str; 9] = ["fork", "vfork", "iopl", "ioperm", "modify_ldt", "uselib", "ustat", "sysfs", "_sysctl"];
    if OLD.contains(&name) { Ok(None) } else { Err(()) }
}
