//! The machine itself: QEMU by software emulation, with a 3D virtio GPU that renders through an X server
//! without a screen. Whatever way this process ends, both die with it (`setpriv --pdeathsig`), and both are
//! killed when this code leaves.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::{Error, file_error};
use crate::command;

/// Linux parameters of L1: nothing slow that tests do not need; a panic ends the machine at once, and a processor that
/// does not schedule for 40 s (twice the threshold) is one, so that the console has its stack.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet panic=-1 softlockup_panic=1 watchdog_thresh=20 mitigations=off \
     init_on_alloc=0 cryptomgr.notests";

/// Where `isa-debug-exit` listens, and what L1 adds to its exit code: QEMU makes `2 * value + 1` of the value
/// written, and 1 is also its own failure. `tests/e2e/src/bin/l1-init.rs` has the same numbers.
const EXIT_CODE_BASE: i32 = 0x10;

/// A machine that can be started.
#[derive(Clone)]
pub struct Machine {
    /// The kernel's name and version, for people.
    pub version: String,
    /// The ELF kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// How many processors it has.
    pub processors: u8,
    /// All that the console wrote in the last run.
    pub console_log: PathBuf,
    /// What QEMU itself said in the last run.
    pub qemu_log: PathBuf,
    /// A folder of L0 that is `/shared` in L1.
    pub shared: PathBuf,
    /// A folder of L0 that is `/boot` in L1, where nothing can be written to it.
    pub boot: PathBuf,
}

/// How long a machine may take before it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// From its start to its end.
    Whole(Duration),
    /// Without a line on its console.
    Silence(Duration),
}

impl fmt::Display for Limit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(limit) => write!(
                formatter,
                "the time limit of {} s was reached",
                limit.as_secs()
            ),
            Self::Silence(limit) => {
                write!(formatter, "L1 has said nothing for {} s", limit.as_secs())
            }
        }
    }
}

/// How a machine ended.
pub enum Ended {
    /// The program that L1 ran ended with this code.
    Code(u8),
    /// A time limit was reached, and the machine was killed.
    TimeLimit(Limit),
    /// The machine ended without a code, for this reason.
    NoCode(String),
}

/// A child process that does not outlive this value.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An X server without a screen.
struct Display {
    _process: Process,
    /// `:N`.
    name: String,
}

/// A command that is killed when this process ends in any way.
pub fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

impl Display {
    fn start() -> Result<Self, Error> {
        let mut xvfb = bound("Xvfb");
        // The server chooses a free number and writes it to its standard output when it is ready.
        xvfb.args([
            "-displayfd",
            "1",
            "-screen",
            "0",
            "1024x768x24",
            "-nolisten",
            "tcp",
            "-noreset",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
        let mut process = Process(
            xvfb.spawn()
                .map_err(|source| command::not_started(&xvfb, source))?,
        );
        let mut number = String::new();
        if let Some(output) = process.0.stdout.take() {
            let _ = BufReader::new(output).read_line(&mut number);
        }
        if number.trim().is_empty() {
            let said = process
                .0
                .stderr
                .take()
                .map(std::io::read_to_string)
                .and_then(Result::ok)
                .unwrap_or_default();
            return Err(Error::Display(
                said.lines().last().unwrap_or("it said nothing").to_owned(),
            ));
        }
        Ok(Display {
            _process: process,
            name: format!(":{}", number.trim()),
        })
    }
}

impl Machine {
    /// The same machine as one of several that run at once, which have logs of their own.
    pub fn numbered(&self, number: u8) -> Self {
        let of_its_own = |log: &Path| match number {
            1 => log.to_owned(),
            _ => log.with_extension(format!("{number}.log")),
        };
        Machine {
            console_log: of_its_own(&self.console_log),
            qemu_log: of_its_own(&self.qemu_log),
            ..self.clone()
        }
    }

    /// QEMU's command line; `init` is what L1's first process is told.
    fn qemu(&self, display: &Display, init: &str) -> Command {
        let mut qemu = bound("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-machine",
            "q35",
            "-m",
            "4G",
        ])
        .args(["-smp", &self.processors.to_string()])
        .args(["-accel", "tcg", "-cpu", "max,+svm,-erms,-fsrm"])
        .args(["-device", "virtio-gpu-gl-pci", "-display", "sdl,gl=on"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .arg("-kernel")
        .arg(&self.kernel)
        .arg("-initrd")
        .arg(&self.initramfs)
        .args(["-append", &format!("{KERNEL_PARAMETERS} -- {init}")])
        .env("DISPLAY", &display.name)
        .env("SDL_VIDEODRIVER", "x11")
        .env("SDL_AUDIODRIVER", "dummy")
        .env("LIBGL_ALWAYS_SOFTWARE", "1");
        for (tag, folder, access) in [
            ("shared", &self.shared, ""),
            ("boot", &self.boot, ",readonly=on"),
        ] {
            qemu.arg("-device")
                .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"))
                .arg("-fsdev")
                .arg(format!(
                    "local,id={tag},security_model=none,path={}{access}",
                    option(folder)
                ));
        }
        qemu
    }

    /// Gives the terminal to a console in L1 until the machine ends. True when it ended by itself or by its user.
    pub fn shell(&self) -> Result<bool, Error> {
        let display = Display::start()?;
        // QEMU makes the terminal raw; if it dies without undoing that, this does.
        let terminal = std::io::stdin()
            .is_terminal()
            .then(|| {
                Command::new("stty")
                    .arg("-g")
                    .stdin(Stdio::inherit())
                    .output()
                    .ok()
            })
            .flatten();
        let mut qemu = self.qemu(&display, "shell");
        qemu.args(["-serial", "mon:stdio"]);
        let mut process = Process(
            qemu.spawn()
                .map_err(|source| command::not_started(&qemu, source))?,
        );
        let status = process
            .0
            .wait()
            .map_err(|source| command::not_started(&qemu, source))?;
        if let Some(saved) = terminal {
            let _ = Command::new("stty")
                .arg(String::from_utf8_lossy(&saved.stdout).trim())
                .status();
        }
        Ok(status.code() == Some(0) || exit_code(status) == Some(0))
    }

    /// Runs a program of L1 and gives each line of the console to `on_line` as it comes. `words` are the program's
    /// name and arguments; they travel on the kernel's command line, so none of them may contain `"`. The machine is killed after
    /// `whole`, or `silence` without a line.
    pub fn run(
        &self,
        words: &[&str],
        whole: Duration,
        silence: Duration,
        mut on_line: impl FnMut(&str),
    ) -> Result<Ended, Error> {
        let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
        let file = |path: &Path| File::create(path).map_err(file_error("write", path));
        let mut log = file(&self.console_log)?;
        let errors = file(&self.qemu_log)?;

        let display = Display::start()?;
        let mut qemu = self.qemu(&display, &format!("run {}", quoted.join(" ")));
        qemu.args(["-serial", "stdio", "-monitor", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let deadline = Instant::now() + whole;
        let mut process = Process(
            qemu.spawn()
                .map_err(|source| command::not_started(&qemu, source))?,
        );
        let (sender, lines) = mpsc::channel();
        if let Some(console) = process.0.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                    if sender.send(plain(&line)).is_err() {
                        break;
                    }
                }
            });
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left.min(silence)) {
                Ok(line) => {
                    let _ = writeln!(log, "{line}");
                    on_line(&line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Ok(Ended::TimeLimit(if silence < left {
                        Limit::Silence(silence)
                    } else {
                        Limit::Whole(whole)
                    }));
                }
            }
        }
        let status = process
            .0
            .wait()
            .map_err(|source| command::not_started(&qemu, source))?;
        Ok(match exit_code(status) {
            Some(code) => Ended::Code(code),
            None => Ended::NoCode(self.reason(status)),
        })
    }

    /// Why a machine that ended with `status` gave no exit code.
    fn reason(&self, status: ExitStatus) -> String {
        let said = fs::read_to_string(&self.qemu_log).unwrap_or_default();
        let said = said
            .lines()
            .last()
            .map(|line| format!(", `{line}`"))
            .unwrap_or_default();
        match status.code() {
            Some(0) => "L1 rebooted or its kernel panicked".to_owned(),
            _ => format!("QEMU ended with {status}{said}"),
        }
    }
}

/// A path as a value in one of QEMU's option lists, where a comma is written twice.
fn option(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The code that L1 wrote to `isa-debug-exit`; none if QEMU ended in another way.
fn exit_code(status: ExitStatus) -> Option<u8> {
    let value = (status.code()? - 1) / 2 - EXIT_CODE_BASE;
    (status.code()? % 2 == 1)
        .then(|| u8::try_from(value).ok())
        .flatten()
}

/// A console line without carriage returns and terminal control sequences.
fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut output = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            // ESC [ parameters, then one final byte; the firmware writes a few of these.
            '\u{1b}' => {
                if characters.next() == Some('[') {
                    characters
                        .by_ref()
                        .find(|character| ('@'..='~').contains(character));
                } else {
                    characters.next();
                }
            }
            '\t' => output.push(' '),
            character if character.is_control() => {}
            character => output.push(character),
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_exit_code_of_l1_is_told_from_those_of_qemu() {
        let ended = |code: i32| exit_code(ExitStatus::from_raw(code << 8));
        assert_eq!(ended(0x21), Some(0));
        assert_eq!(ended(0x23), Some(1));
        assert_eq!(ended(0), None);
        assert_eq!(ended(1), None);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), None);
    }

    #[test]
    fn console_lines_lose_their_control_sequences() {
        assert_eq!(plain(b"\x1b[2J\x1b[1;1Hok a\t3\r"), "ok a 3");
    }
}
