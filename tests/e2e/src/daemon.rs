//! `pvgpu-proxyd` as a process, with a socket in a folder of its own.
//!
//! End-to-end tests and benchmarks start it. Dropping it ends the process.

use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A running daemon.
pub struct Daemon {
    user: Option<u32>,
    program: PathBuf,
    options: Vec<String>,
    folder: tempfile::TempDir,
    child: Child,
    /// What it says, line by line.
    lines: Receiver<String>,
}

impl Daemon {
    /// Starts `program` with these options and a socket, and waits until it listens.
    pub fn start(program: &Path, options: &[&str]) -> io::Result<Self> {
        Self::start_as(None, program, options)
    }

    /// As [`Daemon::start`], as this user, who has nothing but the socket's folder.
    pub fn start_as(user: Option<u32>, program: &Path, options: &[&str]) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        if user.is_some() {
            chown(folder.path(), user, user)?;
        }
        let options: Vec<_> = options.iter().map(|option| option.to_string()).collect();
        let (child, lines) = spawn(user, program, &options, &folder.path().join("socket"))?;
        Ok(Self {
            user,
            program: program.into(),
            options,
            folder,
            child,
            lines,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it by SIGKILL.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Starts it once more where it was, after [`Daemon::kill`].
    pub fn restart(&mut self) -> io::Result<()> {
        (self.child, self.lines) = spawn(self.user, &self.program, &self.options, &self.socket())?;
        Ok(())
    }

    /// Waits until it says a line with these words in it, and returns that.
    pub fn wait_for(&self, words: &str) -> io::Result<String> {
        wait_for(&self.lines, words)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}

fn spawn(
    user: Option<u32>,
    program: &Path,
    options: &[String],
    socket: &Path,
) -> io::Result<(Child, Receiver<String>)> {
    let mut command = Command::new(program);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let mut child = command
        .arg("--socket")
        .arg(socket)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().expect("a pipe was asked for");
    let (say, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            // Nobody may listen any more; its pipe must not fill up all the same.
            let _ = say.send(line);
        }
    });
    wait_for(&lines, "waiting for a front end")?;
    Ok((child, lines))
}

fn wait_for(lines: &Receiver<String>, words: &str) -> io::Result<String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut last = "nothing".to_owned();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left).map_err(|error| {
            let why = match error {
                RecvTimeoutError::Timeout => "does not say",
                RecvTimeoutError::Disconnected => "has ended and not said",
            };
            io::Error::other(format!("the daemon {why} '{words}', but at last '{last}'"))
        })?;
        if line.contains(words) {
            return Ok(line);
        }
        last = line;
    }
}
