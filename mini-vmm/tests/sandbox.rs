//! What a running mini-vmm keeps from its guest, and from other programs of its user.

#![allow(unsafe_code)]

mod kernels;

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kernels::{TempFile, with_kvm};
use pvgpu_host_proxy::control;
use pvgpu_host_proxy::files;
use pvgpu_host_proxy::sandbox::{Filter, Sandbox, THREAD};
use pvgpu_mini_vmm::{Console, Vm, VmConfig, sandbox};

/// A user that owns nothing (Debian's `nobody`).
const NOBODY: u32 = 65534;

/// Longer than a machine takes to start when all tests run at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// A mini-vmm with a guest that never ends. Killed when dropped.
struct Running {
    process: Child,
    _kernel: TempFile,
}

impl Running {
    /// Starts `program` with these arguments, as that user if one is given, and waits until its guest runs.
    fn start(program: &Path, arguments: &[&str], user: Option<u32>) -> Self {
        let mut command = Command::new(program);
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        Self::start_by(&mut command, arguments)
    }

    fn start_by(command: &mut Command, arguments: &[&str]) -> Self {
        let kernel = TempFile::new(&kernels::elf(kernels::endless()));
        fs::set_permissions(kernel.path(), Permissions::from_mode(0o644)).unwrap();
        command
            .args(["run", "--kernel"])
            .arg(kernel.path())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        // A copy that was just written may still be open in a process that another test is about to start.
        let process = loop {
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                other => break other.unwrap(),
            }
        };
        let mut running = Self {
            process,
            _kernel: kernel,
        };
        let deadline = Instant::now() + PATIENCE;
        while !running.threads().iter().any(|(name, _)| name == "vcpu0") {
            assert_eq!(
                running.process.try_wait().unwrap(),
                None,
                "mini-vmm has ended"
            );
            assert!(
                Instant::now() < deadline,
                "no vCPU: {:?}",
                running.threads()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        running
    }

    /// A file of `/proc` about it.
    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.process.id())
    }

    /// Name and number of filters of each thread; those that the kernel runs for KVM are left out.
    fn threads(&self) -> Vec<(String, u32)> {
        let tasks = fs::read_dir(self.proc("task")).unwrap();
        let threads = tasks.filter_map(|task| {
            let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name));
                value.map(|value| value.trim().to_owned())
            };
            Some((field("Name:")?, field("Seccomp_filters:")?.parse().ok()?))
        });
        threads
            .filter(|(name, _)| !name.starts_with("kvm"))
            .collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mini-vmm"))
}

/// Where a test can make a file.
fn new_path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("mini-vmm-{name}-{}", std::process::id()))
}

#[test]
fn no_thread_of_mini_vmm_runs_without_a_filter_while_a_guest_runs() {
    if !with_kvm() {
        return;
    }
    let socket = new_path("filtered");
    let control = ["--control", socket.to_str().unwrap()];
    let arguments = [&["--cpus", "2", "--sandbox", "on"], &control[..]].concat();
    let running = Running::start(program(), &arguments, None);
    let deadline = Instant::now() + PATIENCE;
    // The main thread enters its sandbox last.
    while running.threads().iter().any(|(_, filters)| *filters == 0) {
        assert!(Instant::now() < deadline, "{:?}", running.threads());
        std::thread::sleep(Duration::from_millis(5));
    }
    let threads = running.threads();
    for name in ["mini-vmm", "vcpu0", "vcpu1", "signals", "pvgpu-control"] {
        assert!(
            threads.iter().any(|(thread, _)| thread == name),
            "{name}: {threads:?}"
        );
    }

    drop(running);
    fs::remove_file(socket).unwrap();
    let free = Running::start(program(), &["--sandbox", "off"], None);
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        free.threads().iter().all(|(_, filters)| *filters == 0),
        "{:?}",
        free.threads()
    );
}

/// The errno with which a process of that user fails to open a file.
fn refusal(user: u32, path: &str) -> Option<i32> {
    let path = CString::new(path).unwrap();
    let mut probe = Command::new("/bin/true");
    probe.uid(user).gid(user);
    // SAFETY: between fork and exec, this makes one system call, on memory that was allocated before.
    unsafe {
        probe.pre_exec(move || match libc::open(path.as_ptr(), libc::O_RDONLY) {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    probe.status().err().and_then(|error| error.raw_os_error())
}

#[test]
fn another_process_of_the_same_user_reaches_neither_memory_nor_descriptors_of_mini_vmm() {
    if !with_kvm() {
        return;
    }
    let user = fs::metadata("/proc/self").unwrap().uid();
    assert_eq!(
        user, 0,
        "this test starts processes of another user: run it as root"
    );
    // A copy where that user can start it, and a node of KVM that it may use.
    let folder = std::env::temp_dir().join(format!("mini-vmm-nobody-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    let copy = folder.join("mini-vmm");
    fs::copy(program(), &copy).unwrap();
    let (kvm, number) = (folder.join("kvm"), fs::metadata("/dev/kvm").unwrap().rdev());
    let (major, minor) = (libc::major(number), libc::minor(number));
    let mut mknod = Command::new("/bin/mknod");
    let mknod = mknod
        .arg(&kvm)
        .args(["c".into(), major.to_string(), minor.to_string()]);
    assert!(mknod.status().unwrap().success(), "{kvm:?}");
    std::os::unix::fs::chown(&kvm, Some(NOBODY), None).unwrap();
    let kvm = ["--kvm", kvm.to_str().unwrap()];
    let running = Running::start(&copy, &kvm, Some(NOBODY));
    fs::remove_dir_all(&folder).unwrap();
    for file in ["mem", "maps", "environ", "fd/0", "fd/1"] {
        let path = running.proc(file);
        assert_eq!(refusal(NOBODY, &path), Some(libc::EACCES), "{path}");
    }
    // One that does not hide shows that users may look at their own.
    let mut plain = Command::new("/bin/sleep");
    let mut plain = plain.arg("100").uid(NOBODY).gid(NOBODY).spawn().unwrap();
    let seen = refusal(NOBODY, &format!("/proc/{}/mem", plain.id()));
    plain.kill().unwrap();
    plain.wait().unwrap();
    assert_eq!(seen, None);
}

/// The errno with which a process of that user fails to get an answer from the control socket there; `EPIPE` if it is closed
/// without one.
fn no_answer(user: u32, path: &Path) -> Option<i32> {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    let path = path.to_str().unwrap();
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from.cast_signed();
    }
    let request = [control::VERSION, 0];
    let mut probe = Command::new("/bin/true");
    probe.uid(user).gid(user);
    // SAFETY: between fork and exec, this makes system calls on values that it owns, and touches nothing else.
    unsafe {
        probe.pre_exec(move || {
            let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            let length = size_of_val(&address) as libc::socklen_t;
            let mut byte = [0u8];
            if libc::connect(socket, (&raw const address).cast(), length) < 0 {
                return Err(io::Error::last_os_error());
            }
            libc::send(socket, request.as_ptr().cast(), 2, libc::MSG_NOSIGNAL);
            match libc::recv(socket, byte.as_mut_ptr().cast(), 1, 0) {
                1 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EPIPE)),
            }
        });
    }
    probe.status().err().and_then(|error| error.raw_os_error())
}

#[test]
fn another_user_gets_nothing_from_the_control_socket_even_if_its_file_lets_it_connect() {
    if !with_kvm() {
        return;
    }
    let user = fs::metadata("/proc/self").unwrap().uid();
    assert_eq!(
        user, 0,
        "this test starts processes of another user: run it as root"
    );
    let socket = new_path("users");
    let arguments = ["--control", socket.to_str().unwrap()];
    let running = Running::start(program(), &arguments, None);
    assert_eq!(no_answer(user, &socket), None);
    assert_eq!(no_answer(NOBODY, &socket), Some(libc::EACCES));
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    assert_eq!(no_answer(NOBODY, &socket), Some(libc::EPIPE));
    drop(running);
    fs::remove_file(socket).unwrap();
}

/// Makes a program's core dumps as large as they are, in the folder for temporary files.
fn with_core_dumps(command: &mut Command) -> &mut Command {
    command.current_dir(std::env::temp_dir());
    let all = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: between fork and exec, this makes one system call, which reads a value that it owns.
    unsafe {
        command.pre_exec(
            move || match libc::setrlimit(libc::RLIMIT_CORE, &raw const all) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
        )
    }
}

#[test]
fn a_mini_vmm_that_crashes_leaves_no_core_dump_with_the_guests_memory() {
    if !with_kvm() {
        return;
    }
    let abort = |process: &mut Child| {
        // SAFETY: signals a child that nobody has waited for.
        unsafe { libc::kill(process.id().cast_signed(), libc::SIGABRT) };
        let status = process.wait().unwrap();
        let core = std::env::temp_dir().join("core");
        let cores = [core.clone(), core.with_extension(process.id().to_string())];
        cores.iter().for_each(|core| drop(fs::remove_file(core)));
        status
    };
    let mut running = Running::start_by(with_core_dumps(&mut Command::new(program())), &[]);
    let status = abort(&mut running.process);
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    assert!(!status.core_dumped());
    // Whether this machine makes core dumps at all.
    let mut sleep = Command::new("/bin/sleep");
    let mut plain = with_core_dumps(sleep.arg("100")).spawn().unwrap();
    assert!(
        abort(&mut plain).core_dumped(),
        "set /proc/sys/kernel/core_pattern to `core` for this test"
    );
}

#[test]
fn files_that_mini_vmm_creates_are_for_its_user_alone() {
    if !with_kvm() {
        return;
    }
    let (trace, dump, socket) = (new_path("trace"), new_path("dump"), new_path("control"));
    let arguments = [
        "--control",
        socket.to_str().unwrap(),
        "--trace",
        trace.to_str().unwrap(),
        "--dump",
        dump.to_str().unwrap(),
    ];
    let running = Running::start(program(), &arguments, None);
    for path in [&trace, &dump, &socket] {
        let mode = fs::metadata(path).unwrap().permissions().mode();
        fs::remove_file(path).unwrap();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
    drop(running);
}

/// What the tests below do in a process of their own: named by this variable, in a test of this name.
const CHILD: &str = "PVGPU_TEST_CHILD";

fn child(action: &str) -> (Option<i32>, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_child", "--ignored", "--nocapture"])
        .env(CHILD, action)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.signal(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// A console whose every byte opens a file, on the thread of the vCPU that prints it.
struct Opening;

impl Write for Opening {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        File::open("/dev/null").map(|_| bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is no thread's to do.
fn forbidden(action: &str) {
    let path = c"/dev/null".as_ptr();
    // SAFETY: calls that change nothing of this process's memory, and are not made if the test passes.
    unsafe {
        match action {
            "openat" => libc::syscall(libc::SYS_openat, -100, path, 0),
            "execve" => libc::syscall(libc::SYS_execve, path, 0, 0),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
            "mmap" => libc::syscall(libc::SYS_mmap, 0, 4096, libc::PROT_EXEC, 0x22, -1, 0),
            "mprotect" => libc::syscall(libc::SYS_mprotect, 0, 4096, libc::PROT_EXEC),
            // KVM_CREATE_VM
            "ioctl" => libc::syscall(libc::SYS_ioctl, -1, 0xae01, 0),
            other => panic!("no such action: {other}"),
        }
    };
    println!("the system call has returned");
}

#[test]
#[ignore = "the process that the tests of the sandbox start"]
fn the_child() {
    let Ok(action) = std::env::var(CHILD) else {
        return;
    };
    let table = |rows| Filter::new(Sandbox::On, THREAD.iter().chain(rows)).unwrap();
    let under = |filter: Filter, name: &str, action: &str| {
        let action = action.to_owned();
        let thread = filter
            .spawn(name.into(), move || forbidden(&action))
            .unwrap();
        thread.join().unwrap();
    };
    match action.split_once(' ') {
        Some(("vcpu", action)) => under(table(sandbox::VCPU), "vcpu-test", action),
        Some(("monitor", action)) => under(table(sandbox::MONITOR), "monitor-test", action),
        _ if action == "console" => {
            let kernel = TempFile::new(&kernels::bzimage(kernels::linux_reporter(), 1 << 20));
            let mut config = VmConfig::new(kernel.path());
            config.cmdline = "text".into();
            config.console = Console::output(Opening);
            config.sandbox = Sandbox::On;
            println!(
                "ended: {:?}",
                Vm::new(config).unwrap().run().unwrap().ending
            );
        }
        _ if action == "files" => {
            let other = TempFile::new(b"other");
            let restricted = files::restrict(&[Path::new("/dev/null")], None).unwrap();
            let open = |path: &Path| File::open(path).map(drop).map_err(|error| error.kind());
            println!("landlock: {restricted}");
            println!(
                "device: {:?}",
                File::options().write(true).open("/dev/null").is_ok()
            );
            println!("other: {:?}", open(other.path()));
            println!(
                "new: {:?}",
                File::create(std::env::temp_dir().join("new")).is_ok()
            );
        }
        _ => panic!("no such action: {action}"),
    }
}

#[test]
fn a_vcpu_or_the_monitor_that_makes_a_forbidden_system_call_ends_the_process_and_is_reported() {
    for thread in ["vcpu", "monitor"] {
        for action in ["openat", "execve", "socket", "mmap", "mprotect", "ioctl"] {
            let (signal, said) = child(&format!("{thread} {action}"));
            assert_eq!(signal, Some(libc::SIGSYS), "{thread} {action}: {said}");
            let line =
                format!("the sandbox ends this process: thread {thread}-test made system call");
            assert!(
                said.contains(&line) && said.contains(&format!("({action})")),
                "{said}"
            );
            assert!(!said.contains("has returned"), "{said}");
        }
    }
}

#[test]
fn the_thread_of_a_running_vcpu_that_opens_a_file_ends_the_process_and_is_reported() {
    if !with_kvm() {
        return;
    }
    let (signal, said) = child("console");
    assert_eq!(signal, Some(libc::SIGSYS), "{said}");
    assert!(
        said.contains("thread vcpu0 made system call 257 (openat)"),
        "{said}"
    );
}

/// The kernels of the testbed have Landlock, and a test of it there. Here it depends on the machine, and `restrict` must say
/// which it was.
#[test]
fn a_process_that_is_restricted_to_some_files_opens_no_others() {
    let (_, said) = child("files");
    let has = |line: &str| said.lines().any(|said| said == line);
    assert!(has("device: true"), "{said}");
    match files::available() {
        true => {
            assert!(
                has("landlock: true") && has("other: Err(PermissionDenied)"),
                "{said}"
            );
            assert!(has("new: false"), "{said}");
        }
        false => assert!(has("landlock: false") && has("other: Ok(())"), "{said}"),
    }
}
