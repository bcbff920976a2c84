//! Running mini-vmm in L1 with a time limit, for the tests that have a guest.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Failure;
use super::over::Device;

/// A mini-vmm with its guest. Killed when dropped.
pub struct Running {
    process: Child,
    /// Where its GPU is, if that is elsewhere; killed after it.
    device: Option<Device>,
    log: PathBuf,
}

/// How a run of mini-vmm ended.
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it and its guest wrote, standard error included.
    pub output: String,
}

impl Ended {
    /// A failure, unless the exit code is `code`.
    pub fn expect(&self, code: i32) -> Result<(), Failure> {
        match self.code == code {
            true => Ok(()),
            false => Err(format!(
                "mini-vmm ended with code {}, not {code}: {}",
                self.code,
                self.tail()
            )
            .into()),
        }
    }

    /// The last lines of the output, for a failure's one line.
    pub fn tail(&self) -> String {
        tail(&self.output)
    }
}

/// The last lines; or all since a guest's kernel began to complain, which says more, and what was last before: a first process that
/// has failed says why, and then the kernel panics.
fn tail(output: &str) -> String {
    const COMPLAINTS: &[&str] = &[
        "cut here",
        "BUG:",
        "Oops:",
        "general protection",
        "traps:",
        "Kernel panic",
    ];
    let lines: Vec<&str> = output
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let complains = |line: &&str| COMPLAINTS.iter().any(|words| line.contains(words));
    let last = lines.len().saturating_sub(4);
    let before = |complaint: usize| complaint.saturating_sub(4);
    let first = lines.iter().position(complains).map_or(last, before);
    let first = first.min(last);
    match lines.split_at(first).1 {
        [] => "it wrote nothing".to_owned(),
        last => format!("it wrote at last `{}`", last.join(" | ")),
    }
}

/// How many times as long as the tests say they wait for guests.
static PATIENCE: AtomicU32 = AtomicU32::new(1);

/// From here on, tests wait for guests so many times as long: for slow kernels and busy machines.
pub fn set_patience(times: u32) {
    PATIENCE.store(times, Ordering::Relaxed);
}

/// Sleeps before a guest is looked at again, the longer the longer that has been going on: each look takes L1's only processor away
/// from the guest, and emulated nested paging starts with empty tables after that.
fn pause(since: Instant) {
    let (shortest, longest) = (Duration::from_millis(1), Duration::from_millis(100));
    std::thread::sleep((since.elapsed() / 50).clamp(shortest, longest));
}

fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit * PATIENCE.load(Ordering::Relaxed)
}

/// Where L1 has the test guest.
pub const TEST_GUEST: &str = "/boot/pvgpu-test-guest";

/// Starts `mini-vmm run` with `arguments`; its GPU may be put elsewhere ([`super::over`]).
pub fn start(arguments: &[&str]) -> Result<Running, Failure> {
    // A file of its own, not a pipe: nobody has to read it while the guest runs.
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let log = std::env::temp_dir().join(format!("mini-vmm-{number}.log"));
    let output = File::create(&log)?;
    let (device, elsewhere) = Device::start(arguments)?.unzip();
    let arguments = arguments.iter().map(|word| word.to_string());
    let process = Command::new("/bin/mini-vmm")
        .arg("run")
        .args(elsewhere.unwrap_or_else(|| arguments.collect()))
        .stdin(Stdio::piped())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .map_err(|error| format!("cannot start mini-vmm: {error}"))?;
    Ok(Running {
        process,
        device,
        log,
    })
}

/// Starts mini-vmm with the test guest's `scenario` (and what else its command line is to say) and that GPU.
pub fn start_guest(scenario: &str, gpu: &str, more: &[&str]) -> Result<Running, Failure> {
    let command_line = format!("scenario={scenario}");
    let always = [
        "--kernel",
        TEST_GUEST,
        "--cmdline",
        &command_line,
        "--gpu",
        gpu,
    ];
    start(&[&always[..], more].concat())
}

impl Running {
    /// What mini-vmm and its guest have written so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The process that has the guest's GPU: mini-vmm, if it is not elsewhere.
    pub fn process(&self) -> u32 {
        let elsewhere = self.device.as_ref().map(Device::process);
        elsewhere.unwrap_or_else(|| self.process.id())
    }

    /// Types `line` on the guest's console.
    pub fn type_line(&mut self, line: &str) -> Result<(), Failure> {
        let input = self.process.stdin.as_mut().ok_or("mini-vmm has no input")?;
        writeln!(input, "{line}")?;
        Ok(())
    }

    /// Waits until the guest has written `text`; a failure if it has not done so within `limit`, or has ended.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<(), Failure> {
        let (started, deadline) = (Instant::now(), deadline(limit));
        while !self.output().contains(text) {
            let ended = self.process.try_wait()?.is_some();
            if ended || Instant::now() >= deadline {
                return Err(
                    format!("the guest never wrote `{text}`: {}", tail(&self.output())).into(),
                );
            }
            pause(started);
        }
        Ok(())
    }

    /// Whether mini-vmm has ended.
    pub fn has_ended(&mut self) -> Result<bool, Failure> {
        Ok(self.process.try_wait()?.is_some())
    }

    /// Waits for the end; mini-vmm is killed after `limit`, which is a failure.
    pub fn wait(mut self, limit: Duration) -> Result<Ended, Failure> {
        let (started, deadline) = (Instant::now(), deadline(limit));
        let status = loop {
            if let Some(status) = self.process.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                let tail = tail(&self.output());
                return Err(format!("mini-vmm did not end in time: {tail}").into());
            }
            pause(started);
        };
        let output = self.output();
        let code = status
            .code()
            .ok_or_else(|| format!("mini-vmm ended with {status}: {}", tail(&output)))?;
        let forgotten = self.device.as_ref().map_or(Ok(()), Device::end);
        forgotten.map_err(|error| format!("{error}; {}", tail(&output)))?;
        Ok(Ended { code, output })
    }

    /// Kills mini-vmm once its guest has written `text`; a failure if it has not done so within `limit`.
    pub fn kill_when(mut self, text: &str, limit: Duration) -> Result<(), Failure> {
        self.wait_for(text, limit)?;
        match self.process.try_wait()? {
            None => Ok(self.process.kill()?),
            Some(status) => {
                Err(format!("mini-vmm ended with {status} before it could be killed").into())
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.log);
    }
}
