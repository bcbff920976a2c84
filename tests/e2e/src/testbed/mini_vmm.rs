//! Running mini-vmm in L1 with a time limit, for the tests that have a guest.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Failure;

/// How a run of mini-vmm ended.
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it and its guest wrote, standard error included.
    pub output: String,
}

impl Ended {
    /// The last lines of the output, for a failure's one line.
    pub fn tail(&self) -> String {
        tail(&self.output)
    }
}

fn tail(output: &str) -> String {
    let lines: Vec<&str> = output
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    match lines.split_at(lines.len().saturating_sub(4)).1 {
        [] => "it wrote nothing".to_owned(),
        last => format!("it wrote at last `{}`", last.join(" | ")),
    }
}

/// Runs `mini-vmm run` with `arguments`; it is killed after `limit`, which is a failure.
pub fn run(arguments: &[&str], limit: Duration) -> Result<Ended, Failure> {
    // A file of its own, not a pipe: nobody has to read it while the guest runs.
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("mini-vmm-{number}.log"));
    let log = File::create(&path)?;
    let mut process = Command::new("/bin/mini-vmm")
        .arg("run")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map_err(|error| format!("cannot start mini-vmm: {error}"))?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = process.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            process.kill()?;
            process.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
    let Some(status) = status else {
        return Err(format!(
            "mini-vmm did not end within {} s: {}",
            limit.as_secs(),
            tail(&output)
        )
        .into());
    };
    let code = status
        .code()
        .ok_or_else(|| format!("mini-vmm ended with {status}: {}", tail(&output)))?;
    Ok(Ended { code, output })
}
