//! Each kind of thread does, in a process of its own, what it must not; and what it may.

#![allow(unsafe_code)]

use super::*;
use crate::{control, drm, soft};
use pvgpu_protocol::family::{self, virtio_gpu};
use pvgpu_protocol::schema::command;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

/// The kinds of thread, by what they may do beyond [`THREAD`].
fn kinds() -> Vec<(&'static str, Vec<Allowed>)> {
    let device = |more: &[Allowed]| [DEVICE, more].concat();
    vec![
        (
            "device on vgem",
            device(&drm::system_calls(family::of_driver("vgem"))),
        ),
        (
            "device on virtio_gpu",
            device(&drm::system_calls(family::of_driver("virtio_gpu"))),
        ),
        ("device on soft", device(soft::SYSTEM_CALLS)),
        ("engine", Vec::new()),
        ("opener", drm::OPENER.to_vec()),
        ("control", control::SYSTEM_CALLS.to_vec()),
    ]
}

fn filter(kind: &str) -> Filter {
    let kinds = kinds();
    let (_, more) = kinds.iter().find(|(name, _)| *name == kind).unwrap();
    Filter::new(Sandbox::On, THREAD.iter().chain(more)).unwrap()
}

/// Makes a system call as it is.
fn call(number: i64, arguments: [i64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: only calls of `FORBIDDEN` and those of the tests below, none of which touches memory of this process that is
    // in use: their addresses are null, constants, or of fresh mappings.
    unsafe { libc::syscall(number, a, b, c, d, -1, 0) }
}

/// The legacy ioctl that makes its caller the master of the displays: in no schema.
const SET_MASTER: i64 = 0x641e;

/// What no thread may do: what it is called in a report, and how it is done.
const FORBIDDEN: &[(&str, i64, [i64; 4])] = &[
    // What would make a file; the opener may open some.
    (
        "openat",
        libc::SYS_openat,
        [-100, 0, libc::O_CREAT as i64 | libc::O_RDWR as i64, 0o600],
    ),
    ("open", libc::SYS_open, [0, 0, 0, 0]),
    ("openat2", libc::SYS_openat2, [-100, 0, 0, 24]),
    ("execve", libc::SYS_execve, [0, 0, 0, 0]),
    ("execveat", libc::SYS_execveat, [-100, 0, 0, 0]),
    ("fork", libc::SYS_fork, [0; 4]),
    ("vfork", libc::SYS_vfork, [0; 4]),
    ("clone", libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0, 0]),
    (
        "socket",
        libc::SYS_socket,
        [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0, 0],
    ),
    (
        "socketpair",
        libc::SYS_socketpair,
        [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0, 0],
    ),
    ("connect", libc::SYS_connect, [0; 4]),
    (
        "mmap",
        libc::SYS_mmap,
        [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as i64, 0x22],
    ),
    (
        "mprotect",
        libc::SYS_mprotect,
        [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as i64, 0],
    ),
    ("pkey_mprotect", libc::SYS_pkey_mprotect, [0, 4096, 0, 0]),
    ("ioctl", libc::SYS_ioctl, [0, SET_MASTER, 0, 0]),
    (
        "ptrace",
        libc::SYS_ptrace,
        [libc::PTRACE_TRACEME as i64, 0, 0, 0],
    ),
    ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0]),
    ("tgkill", libc::SYS_tgkill, [1, 1, 0, 0]),
    (
        "prctl",
        libc::SYS_prctl,
        [libc::PR_SET_DUMPABLE as i64, 1, 0, 0],
    ),
    (
        "rt_sigaction",
        libc::SYS_rt_sigaction,
        [libc::SIGSYS as i64, 0, 0, 8],
    ),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [0; 4]),
    ("mount", libc::SYS_mount, [0; 4]),
];

/// What a thread under `kind`'s filter does in the process of `child`.
fn act(action: &str) {
    if let Some((_, number, arguments)) = FORBIDDEN.iter().find(|(name, ..)| *name == action) {
        call(*number, *arguments);
        println!("the system call has returned");
        return;
    }
    match action {
        "live" => {
            // Threads at a time, each with a heap that grows and is trimmed; more of them than glibc makes heaps for without
            // thinking. A clock, a lock, a sleep.
            let threads: Vec<_> = std::iter::repeat_with(|| {
                thread::spawn(|| {
                    drop(std::hint::black_box(vec![vec![1u8; 100 << 10]; 64]));
                    thread::sleep(std::time::Duration::from_millis(20));
                })
            })
            .take(24)
            .collect();
            drop(std::hint::black_box(vec![vec![1u8; 100 << 10]; 64]));
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
            let _ = std::time::Instant::now();
            println!("lives");
        }
        "clone3" => {
            assert_eq!(call(libc::SYS_clone3, [0, 0, 0, 0]), -1);
            println!("{}", io::Error::last_os_error());
        }
        "another size" => {
            let command = command::with_size(virtio_gpu::GETPARAM, 24);
            call(libc::SYS_ioctl, [-1, command.into(), 0, 0]);
            println!("the system call has returned");
        }
        "panic" => panic!("a defect"),
        other => panic!("no such action: {other}"),
    }
}

/// Runs `action` in a thread under the filter of `kind`, in a process of its own.
fn child(kind: &str, action: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "sandbox::tests::the_child",
            "--ignored",
            "--nocapture",
        ])
        .env("PVGPU_TEST_KIND", kind)
        .env("PVGPU_TEST_ACTION", action)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap()
}

#[test]
#[ignore = "the process that the tests of the sandbox start"]
fn the_child() {
    let (Ok(kind), Ok(action)) = (
        std::env::var("PVGPU_TEST_KIND"),
        std::env::var("PVGPU_TEST_ACTION"),
    ) else {
        return;
    };
    let thread = filter(&kind).spawn("pvgpu-test".into(), move || act(&action));
    println!("ended: {:?}", thread.unwrap().join().is_ok());
}

#[test]
fn a_forbidden_system_call_ends_the_process_and_is_reported_whatever_thread_makes_it() {
    for (kind, _) in kinds() {
        for (name, number, _) in FORBIDDEN {
            let output = child(kind, name);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                output.status.signal(),
                Some(libc::SIGSYS),
                "{kind}, {name}: {said}"
            );
            let line = format!(
                "pvgpu: the sandbox ends this process: thread pvgpu-test made system call {number} ({name}), which its filter forbids, with arguments 0x"
            );
            let lines = said.lines().filter(|said| said.starts_with(&line));
            assert_eq!(lines.count(), 1, "{kind}, {name}: {said}");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(!said.contains("has returned"), "{kind}, {name}: {said}");
        }
    }
}

#[test]
fn a_thread_in_the_sandbox_can_do_what_the_standard_library_does() {
    for (kind, _) in kinds() {
        let output = child(kind, "live");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("lives\nended: true"), "{kind}: {output:?}");
    }
}

#[test]
fn clone3_is_refused_as_by_an_old_kernel() {
    let output = child("device on soft", "clone3");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("Function not implemented"), "{output:?}");
}

#[test]
fn a_panic_in_the_sandbox_prints_its_message_and_unwinds() {
    let output = child("device on soft", "panic");
    let (said, result) = (
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout),
    );
    let line = "thread 'pvgpu-test' panicked at host-proxy/src/sandbox/tests.rs:";
    assert!(said.contains(line) && said.contains(": a defect"), "{said}");
    assert!(result.contains("ended: false"), "{result}");
}

/// Whether a filter of these rows allows that ioctl.
fn allows_ioctl(calls: &[Allowed], command: u32) -> bool {
    calls
        .iter()
        .filter(|call| call.number == libc::SYS_ioctl)
        .any(|call| call.only == Only::Equal(1, command))
}

#[test]
fn the_ioctls_of_the_sandbox_are_those_of_the_schemas_and_no_others() {
    for name in ["vgem", "virtio_gpu"] {
        let families = family::of_driver(name);
        let calls = drm::system_calls(families);
        let mut forms = 0;
        for ioctl in families.iter().flat_map(|family| family.ioctls) {
            let sizes = ioctl.older_sizes.iter().chain([&ioctl.argument.size]);
            for size in sizes {
                let command = command::with_size(ioctl.command, *size);
                assert_eq!(
                    ioctl.accept(command).map(usize::from),
                    Ok(usize::from(*size))
                );
                assert!(allows_ioctl(&calls, command), "{name}: {}", ioctl.name);
                forms += 1;
            }
        }
        let rows = calls.iter().filter(|call| call.number == libc::SYS_ioctl);
        assert_eq!(rows.count(), forms, "{name}");
        for refused in families.iter().flat_map(|family| family.refused) {
            let number = |call: &&Allowed| match call.only {
                Only::Equal(1, command) => command & 0xff == u32::from(refused.number),
                _ => true,
            };
            let ioctls = calls.iter().filter(|call| call.number == libc::SYS_ioctl);
            let own = families.iter().flat_map(|family| family.ioctls);
            let described = own.filter(|own| own.command & 0xff == u32::from(refused.number));
            assert_eq!(
                ioctls.filter(number).count() > 0,
                described.count() > 0,
                "{name}: {}",
                refused.name
            );
        }
    }
    // The embedded GPU's never reach the kernel.
    assert!(
        soft::SYSTEM_CALLS
            .iter()
            .all(|call| call.number != libc::SYS_ioctl)
    );
}

#[test]
fn an_ioctl_of_the_schemas_reaches_the_kernel_and_another_size_of_it_ends_the_process() {
    for ioctl in family::of_driver("virtio_gpu")
        .iter()
        .flat_map(|family| family.ioctls)
    {
        // No descriptor is that large, so the kernel does nothing but look for it.
        let command = ioctl.command;
        let tried = filter_result("device on virtio_gpu", command);
        assert_eq!(tried, Some(libc::EBADF), "{}", ioctl.name);
    }
    let output = child("device on virtio_gpu", "another size");
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}

/// The errno of an ioctl on no descriptor, in a thread under that filter.
fn filter_result(kind: &str, command: u32) -> Option<i32> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let ioctl = move || {
        call(libc::SYS_ioctl, [i64::from(i32::MAX), command.into(), 0, 0]);
        sender
            .send(io::Error::last_os_error().raw_os_error())
            .unwrap();
    };
    filter(kind)
        .spawn("pvgpu-test".into(), ioctl)
        .unwrap()
        .join()
        .unwrap();
    receiver.recv().unwrap()
}

#[test]
fn without_the_sandbox_a_thread_may_open_files() {
    let filter = Filter::new(Sandbox::Off, THREAD).unwrap();
    let open = || {
        assert!(!is_filtered());
        std::fs::File::open("/dev/null").unwrap();
    };
    filter.spawn("free".into(), open).unwrap().join().unwrap();
}

#[test]
fn no_table_has_a_row_twice() {
    for (kind, more) in kinds() {
        let rows: Vec<_> = THREAD.iter().chain(&more).collect();
        for (index, row) in rows.iter().enumerate() {
            let same = |other: &&&Allowed| (other.number, other.only) == (row.number, row.only);
            assert!(
                !rows[..index].iter().any(|other| same(&other)),
                "{kind}: {row:?}"
            );
        }
    }
}
