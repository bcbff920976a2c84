//! Log lines that a guest can cause, at a bounded rate.
//!
//! Lines of this crate that a guest can cause go through `guest_log!`, which bounds each place in the code by itself.
//! Libraries below it write some too (`virtio-queue` reports every broken ring as an error): a process that offers the
//! device should wrap its logger in [`Limited`], as `mini-vmm` does.

use log::{Level, LevelFilter, Log, Metadata, Record};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a [`Rate`] counts before it begins anew.
pub const PERIOD: Duration = Duration::from_secs(10);

/// Most lines of one place of this crate in a [`PERIOD`], and what `mini-vmm` uses for all lines.
pub const LINES: u32 = 20;

/// Bounds how many lines are written in a [`PERIOD`].
pub struct Rate {
    lines: u32,
    /// Beginning of this period, and the lines wanted in it.
    period: Mutex<(Option<Instant>, u32)>,
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is written.
    Written,
    /// It is the first that is left out, which is worth saying.
    FirstLeftOut,
    /// It is left out.
    LeftOut,
}

impl Rate {
    /// At most so many lines in a [`PERIOD`].
    pub const fn new(lines: u32) -> Self {
        Self {
            lines,
            period: Mutex::new((None, 0)),
        }
    }

    /// What becomes of a line that is wanted now.
    pub fn line(&self) -> Fate {
        self.line_at(Instant::now())
    }

    fn line_at(&self, now: Instant) -> Fate {
        let mut period = self.period.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, wanted) = &mut *period;
        if start.is_none_or(|start| now.saturating_duration_since(start) >= PERIOD) {
            (*start, *wanted) = (Some(now), 0);
        }
        *wanted = wanted.saturating_add(1);
        match *wanted {
            wanted if wanted <= self.lines => Fate::Written,
            wanted if wanted == self.lines.saturating_add(1) => Fate::FirstLeftOut,
            _ => Fate::LeftOut,
        }
    }
}

/// A logger that hands on at most so many lines in a [`PERIOD`], whoever writes them, and says when it leaves some out.
pub struct Limited<L> {
    logger: L,
    rate: Rate,
}

impl<L> Limited<L> {
    /// Hands on at most `lines` lines in a [`PERIOD`], and one more that says that others are left out.
    pub const fn new(logger: L, lines: u32) -> Self {
        Self {
            logger,
            rate: Rate::new(lines),
        }
    }
}

impl<L: Log> Log for Limited<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        match self.rate.line() {
            Fate::Written => self.logger.log(record),
            Fate::FirstLeftOut => {
                let mut note = Record::builder();
                note.level(Level::Warn).target(module_path!());
                let text = format_args!("more messages in these {PERIOD:?} are left out");
                self.logger.log(&note.args(text).build());
            }
            Fate::LeftOut => {}
        }
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

/// The program that writes to standard error.
struct Program {
    name: &'static str,
    /// Its crate, as lines name where they come from.
    module: String,
    level: LevelFilter,
}

/// That program, once it is known.
static PROGRAM: OnceLock<Program> = OnceLock::new();

/// Prints lines to standard error, after the program's name.
struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let program = PROGRAM.get();
        program.is_some_and(|program| metadata.level() <= program.level)
    }

    fn log(&self, record: &Record<'_>) {
        if let Some(Program { name, .. }) = PROGRAM.get()
            && self.enabled(record.metadata())
        {
            eprintln!("{name}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// A guest can cause some lines, of ours and of libraries: their rate is bounded, and the program's own lines have another one, so
/// that no guest silences those.
struct Lines {
    own: Limited<Stderr>,
    others: Limited<Stderr>,
}

static LOG: Lines = Lines {
    own: Limited::new(Stderr, LINES),
    others: Limited::new(Stderr, LINES),
};

impl Lines {
    fn of(&self, metadata: &Metadata<'_>) -> &Limited<Stderr> {
        let module = metadata.target().split("::").next();
        match PROGRAM.get() {
            Some(program) if module == Some(&program.module) => &self.own,
            _ => &self.others,
        }
    }
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.of(metadata).enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.of(record.metadata()).log(record);
    }

    fn flush(&self) {}
}

/// For programs, once: lines of this level go to standard error, after the program's name, at a bounded rate.
pub fn to_stderr(name: &'static str, level: LevelFilter) {
    let module = name.replace('-', "_");
    let _ = PROGRAM.set(Program {
        name,
        module,
        level,
    });
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(level);
    }
}

/// Logs a line that a guest can cause as often as it likes: `guest_log!(warn, "..")`.
macro_rules! guest_log {
    ($level:ident, $($text:tt)*) => {{
        static RATE: $crate::logging::Rate = $crate::logging::Rate::new($crate::logging::LINES);
        match RATE.line() {
            $crate::logging::Fate::Written => log::$level!($($text)*),
            $crate::logging::Fate::FirstLeftOut => {
                let period = $crate::logging::PERIOD;
                log::$level!("more messages of that kind in these {period:?} are left out");
            }
            $crate::logging::Fate::LeftOut => {}
        }
    }};
}
pub(crate) use guest_log;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_lets_so_many_lines_through_in_each_period_and_tells_when_it_stops() {
        let rate = Rate::new(2);
        let start = Instant::now();
        let fates = |after: Duration| [(); 4].map(|()| rate.line_at(start + after));
        let expected = [
            Fate::Written,
            Fate::Written,
            Fate::FirstLeftOut,
            Fate::LeftOut,
        ];
        assert_eq!(fates(Duration::ZERO), expected);
        assert_eq!(fates(PERIOD / 2), [Fate::LeftOut; 4]);
        assert_eq!(fates(PERIOD), expected);
    }

    #[test]
    fn lines_of_the_program_itself_are_counted_apart() {
        to_stderr("a-program", LevelFilter::Off);
        let own = |target| {
            let metadata = Metadata::builder().target(target).build();
            std::ptr::eq(LOG.of(&metadata), &LOG.own)
        };
        assert!(own("a_program") && own("a_program::part"));
        assert!(!own("pvgpu_host_proxy::session") && !own("a_program_of_another"));
    }
}
