//! The benchmark: which machines are booted, what their guest measures, what each number is compared with and what it is
//! to reach. The program `bench` runs it on this machine and in the testbed; `cargo xtask bench` makes the table.
//! `docs/performance.md` explains it to people.
//!
//! A number is never a failure, a missing one is.

use std::collections::HashMap;

use serde::Serialize;

pub mod host;
pub mod machine;
pub mod yardstick;

pub use machine::{BenchError, Proxy, Run, Sample};

use pvgpu_scenarios::bench::COPY_SIZE;

/// Most requests in flight of the pipeline measurements: 1, 2, 4, ..
const PIPELINE_DEPTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Sizes of the payload measurements in bytes.
const PAYLOADS: [u32; 8] = [
    64,
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
];

/// What a number is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most so many times the floor and so many nanoseconds.
    Time {
        /// Factor.
        times: f64,
        /// Nanoseconds.
        plus: f64,
    },
    /// At least this part of the floor's bandwidth.
    Bandwidth(f64),
    /// At most so many doorbells for one operation.
    Doorbells(f64),
    /// At most so many doorbells for one operation, and in the median at most so many times as long as in one process.
    OneProcess {
        /// Doorbells.
        doorbells: f64,
        /// Factor.
        times: f64,
    },
}

/// How often each machine is booted.
const VISITS: u32 = 5;

/// How many batches each machine measures at each of its turns. The machines take turns as batches do: which processors
/// threads run on changes within seconds, and counts for more than what is to be compared.
pub fn turns(rounds: u32) -> impl Iterator<Item = u32> {
    let visits = VISITS.min(rounds);
    (0..visits).map(move |visit| (rounds + visit) / visits)
}

/// A machine, and what was measured in it so far.
#[derive(Debug)]
pub struct Measured {
    /// The machine.
    pub run: Run,
    /// What is measured in it.
    pub rows: Vec<Row>,
    samples: HashMap<String, Sample>,
}

impl Measured {
    /// What its guest has measured at one of its turns, by the guest's names.
    pub fn add(&mut self, samples: HashMap<String, Sample>) {
        for (name, sample) in samples {
            self.samples.entry(name).or_default().add(sample);
        }
    }

    fn sample(&self, name: &str) -> Result<&Sample, BenchError> {
        let sample = self.samples.get(name);
        let sample = sample.filter(|sample| !sample.nanoseconds.is_empty());
        sample.ok_or_else(|| missing(self.run.name, name))
    }
}

fn missing(run: &'static str, measure: &str) -> BenchError {
    BenchError::Missing {
        run,
        measure: measure.to_owned(),
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// Heading that it stands under.
    pub group: &'static str,
    /// What is measured, for people.
    pub title: String,
    /// The guest's name for it.
    pub measure: String,
    /// The guest's names of what it is compared with, together.
    pub floor: Vec<String>,
    /// Requests, or other things of interest, in one operation.
    pub per_operation: u32,
    /// Bytes that one operation copies.
    pub bytes: Option<u64>,
    /// What it is to reach.
    pub goal: Option<Goal>,
}

impl Row {
    fn new(group: &'static str, title: impl Into<String>, measure: impl Into<String>) -> Self {
        Self {
            group,
            title: title.into(),
            measure: measure.into(),
            floor: Vec::new(),
            per_operation: 1,
            bytes: None,
            goal: None,
        }
    }

    fn above(mut self, floor: impl Into<String>) -> Self {
        self.floor.push(floor.into());
        self
    }

    fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    fn bytes(mut self, bytes: u32) -> Self {
        self.bytes = Some(bytes.into());
        self
    }
}

const FLOORS: &str = "floors";
const ROUND_TRIPS: &str = "round trips";
const PIPELINE: &str = "pipelined no-op requests (time of one request)";
const BANDWIDTH: &str = "aperture bandwidth";
const PAYLOAD: &str = "ioctl with a payload";

/// Everything that is to be measured with the host driver of that name.
pub fn machines(driver: &str) -> Vec<Measured> {
    let embedded = driver == "soft";
    let getparam = |how: &str, floor: &str| {
        let native = if embedded { floor } else { "host_getparam" };
        let title = format!("GETPARAM on {driver}, {how}");
        Row::new(ROUND_TRIPS, title, "getparam").above(native)
    };

    let mut inline = vec![
        Row::new(FLOORS, "bare MMIO exit", "mmio_exit"),
        Row::new(ROUND_TRIPS, "no-op request, inline", "nop")
            .above("mmio_exit")
            .goal(Goal::Time {
                times: 1.3,
                plus: 0.0,
            }),
        getparam("inline", "mmio_exit"),
    ];
    let asleep = vec![
        Row::new(
            FLOORS,
            "bare ioeventfd, blocked host thread",
            "ioeventfd_blocked",
        ),
        Row::new(
            FLOORS,
            "bare ioeventfd, spinning host thread",
            "ioeventfd_spinning",
        ),
        Row::new(
            ROUND_TRIPS,
            "no-op request, worker that sleeps",
            "nop_asleep",
        )
        .above("ioeventfd_blocked"),
    ];
    let mut polled = vec![
        Row::new(FLOORS, "bare polled cache line", "polled_line"),
        Row::new(ROUND_TRIPS, "no-op request, polled on both sides", "nop")
            .above("polled_line")
            .goal(Goal::Time {
                times: 3.0,
                plus: 1000.0,
            }),
        getparam("polled on both sides", "polled_line"),
    ];
    if embedded {
        for depth in PIPELINE_DEPTHS {
            let row = |how, floor: &str| Row {
                per_operation: depth,
                goal: Some(Goal::Doorbells(1.0)),
                ..Row::new(
                    PIPELINE,
                    format!("{depth} in flight, {how}"),
                    format!("pipeline_{depth}"),
                )
                .above(floor)
            };
            inline.push(row("inline", "mmio_exit"));
            polled.push(row("polled on both sides", "polled_line"));
        }
        for (title, measure) in [
            ("guest reads a buffer object", "aperture_read"),
            ("guest writes a buffer object", "aperture_write"),
        ] {
            polled.push(
                Row::new(BANDWIDTH, title, measure)
                    .above("host_copy")
                    .bytes(COPY_SIZE as u32)
                    .goal(Goal::Bandwidth(0.9)),
            );
        }
        polled.push(
            Row::new(FLOORS, "memcpy of 4 MiB between host buffers", "host_copy")
                .bytes(COPY_SIZE as u32),
        );
        for size in PAYLOADS {
            // Inline, one processor does everything; polled, all bytes also pass from one processor's cache to another's.
            let row = |how, floor: &str| {
                let (title, measure) =
                    (format!("{}, {how}", bytes(size)), format!("payload_{size}"));
                Row::new(PAYLOAD, title, measure)
                    .above(floor)
                    .above(format!("memcpy_{size}"))
            };
            inline.push(row("inline", "mmio_exit"));
            polled.push(row("polled on both sides", "polled_line"));
        }
    } else {
        let native = Row::new(
            FLOORS,
            format!("GETPARAM on {driver}, native"),
            "host_getparam",
        );
        inline.push(native);
    }
    let process = polled.iter().filter(|row| row.group != FLOORS);
    let process = process.cloned().map(|row| Row {
        title: match row.title.strip_suffix(", polled on both sides") {
            Some(title) => format!("{title}, polled, in another process"),
            None => format!("{}, from another process", row.title),
        },
        goal: match row.group {
            PIPELINE => Some(Goal::OneProcess {
                doorbells: 1.0,
                times: 1.1,
            }),
            _ => row.goal,
        },
        ..row
    });
    let process = process.collect();
    let machine = |name, proxy, rows| Measured {
        run: Run { name, proxy },
        rows,
        samples: HashMap::new(),
    };
    vec![
        machine("inline", Proxy::Inline, inline),
        machine("worker", Proxy::Asleep, asleep),
        machine("polled", Proxy::Polling, polled),
        machine("process", Proxy::Process, process),
    ]
}

fn bytes(size: u32) -> String {
    match size {
        1.. if size.is_multiple_of(1 << 20) => format!("{} MiB", size >> 20),
        1.. if size.is_multiple_of(1 << 10) => format!("{} KiB", size >> 10),
        _ => format!("{size} B"),
    }
}

/// A line of the table with its numbers. Times are nanoseconds of one request or copy.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// As in [`Row`].
    pub group: &'static str,
    /// As in [`Row`].
    pub title: String,
    /// Which machine it was measured in.
    pub run: &'static str,
    /// Median of the batches.
    pub median_ns: f64,
    /// The fastest batch: whatever disturbs a batch makes it slower, so this is what is compared.
    pub best_ns: f64,
    /// What it is compared with.
    pub floor: Option<Floor>,
    /// The best time divided by the floor's best time; for a bandwidth with a goal, the other way round.
    pub ratio: Option<f64>,
    /// Bytes of one copy.
    pub bytes: Option<u64>,
    /// Doorbells of one operation, where the GPU is used.
    pub doorbells: Option<f64>,
    /// What it is to reach.
    pub goal: Option<Outcome>,
}

/// What a number is compared with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// As in [`Row`].
    pub title: String,
    /// Its fastest batch.
    pub best_ns: f64,
}

/// A goal, and whether it is met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The goal in words.
    pub words: String,
    /// Whether the number reaches it.
    pub met: bool,
}

/// The lines of all machines, or the name of a measurement that is missing.
pub fn lines(machines: &[Measured]) -> Result<Vec<Line>, BenchError> {
    let rows = machines
        .iter()
        .flat_map(|machine| machine.rows.iter().map(move |row| (machine, row)));
    rows.map(|(machine, row)| line(machine, row, machines))
        .collect()
}

/// The line of a row of one of the machines.
fn line(machine: &Measured, row: &Row, machines: &[Measured]) -> Result<Line, BenchError> {
    let sample = machine.sample(&row.measure)?;
    let times = sample.each(row.per_operation);
    let median = median(&times);
    let uses_gpu = sample.uses_gpu;
    let doorbells = sample.doorbells_of_one();
    let best = best(&times);
    let mut floor: Option<Floor> = None;
    for name in &row.floor {
        let title = machine.rows.iter().find(|row| row.measure == *name);
        let title = title.map_or(name.as_str(), |row| &row.title);
        let best_ns = self::best(&machine.sample(name)?.each(1));
        floor = Some(match floor {
            None => Floor {
                title: title.to_owned(),
                best_ns,
            },
            Some(floor) => Floor {
                title: format!("{} + {title}", floor.title),
                best_ns: floor.best_ns + best_ns,
            },
        });
    }
    let ratio = floor.as_ref().map(|floor| match row.goal {
        Some(Goal::Bandwidth(_)) => floor.best_ns / best,
        _ => best / floor.best_ns,
    });
    let floor_ns = floor.as_ref().map_or(f64::NAN, |floor| floor.best_ns);
    let outcome = |goal| -> Result<Outcome, BenchError> {
        let (words, met) = match goal {
            Goal::OneProcess {
                doorbells: most,
                times,
            } => {
                let mut machines = machines.iter();
                let there = machines
                    .find(|other| other.run.proxy == Proxy::Polling)
                    .ok_or_else(|| missing("polled", &row.measure))?;
                let there = there.sample(&row.measure)?.each(row.per_operation);
                let there = self::median(&there);
                let words =
                    format!("<= {most} doorbell, median <= {times} x {there:.0} ns in one process");
                (words, doorbells <= most && median <= times * there)
            }
            Goal::Time { times, plus } => {
                let mut words = format!("<= {times} x floor");
                if plus > 0.0 {
                    words += &format!(" + {} us", plus / 1000.0);
                }
                (words, best <= times * floor_ns + plus)
            }
            Goal::Bandwidth(part) => (format!(">= {part} x floor"), floor_ns / best >= part),
            Goal::Doorbells(most) => (format!("<= {most} doorbell"), doorbells <= most),
        };
        Ok(Outcome { words, met })
    };
    Ok(Line {
        group: row.group,
        title: row.title.clone(),
        run: machine.run.name,
        median_ns: median,
        best_ns: best,
        floor,
        ratio,
        bytes: row.bytes,
        doorbells: uses_gpu.then_some(doorbells),
        goal: row.goal.map(outcome).transpose()?,
    })
}

/// The least value; infinite when there is none.
fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The middle value; not a number when there is none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(operations: u64, doorbells: u64, nanoseconds: &[f64]) -> Sample {
        Sample {
            operations,
            doorbells,
            uses_gpu: true,
            nanoseconds: nanoseconds.to_vec(),
        }
    }

    /// The line of a row of a machine whose requests take so many times as long as in one process.
    fn line(row: Row, slower: f64) -> Result<Line, BenchError> {
        let machine = |proxy, slower: f64| Measured {
            run: Run {
                name: "test",
                proxy,
            },
            rows: vec![row.clone()],
            samples: HashMap::from([
                ("floor".to_owned(), sample(30, 0, &[100.0, 200.0, 100.0])),
                (
                    "nop".to_owned(),
                    sample(15, 15, &[200.0, 400.0, 220.0].map(|time| time * slower)),
                ),
            ]),
        };
        let machines = [
            machine(Proxy::Process, slower),
            machine(Proxy::Polling, 1.0),
        ];
        Ok(lines(&machines)?.remove(0))
    }

    #[test]
    fn a_ratio_compares_the_best_batches() {
        let goal = Goal::Time {
            times: 2.0,
            plus: 0.0,
        };
        let row = Row::new("", "x", "nop").above("floor").goal(goal);
        let line = line(row, 1.0).unwrap();
        assert_eq!(line.ratio, Some(2.0));
        assert_eq!((line.median_ns, line.best_ns), (220.0, 200.0));
        assert!(line.goal.unwrap().met);
        assert_eq!(line.doorbells, Some(1.0));
    }

    #[test]
    fn a_floor_of_two_parts_is_their_sum() {
        let row = Row::new("", "x", "nop").above("floor").above("floor");
        let floor = line(row, 1.0).unwrap().floor.unwrap();
        assert_eq!(
            (floor.title.as_str(), floor.best_ns),
            ("floor + floor", 200.0)
        );
    }

    #[test]
    fn a_goal_that_is_missed_is_said_to_be_missed() {
        for (goal, met) in [
            (Goal::Bandwidth(0.5), true),
            (Goal::Bandwidth(0.51), false),
            (Goal::Doorbells(1.0), true),
            (Goal::Doorbells(0.9), false),
            (
                Goal::Time {
                    times: 1.0,
                    plus: 100.0,
                },
                true,
            ),
            (
                Goal::Time {
                    times: 1.0,
                    plus: 99.0,
                },
                false,
            ),
        ] {
            let row = Row::new("", "x", "nop").above("floor").goal(goal);
            let line = line(row, 1.0).unwrap();
            assert_eq!(line.goal.unwrap().met, met, "{goal:?}");
        }
    }

    #[test]
    fn another_process_is_compared_with_the_median_in_one_process() {
        for (slower, met) in [(1.09, true), (1.11, false)] {
            let row = Row::new("", "x", "nop").goal(Goal::OneProcess {
                doorbells: 1.0,
                times: 1.1,
            });
            let goal = line(row, slower).unwrap().goal.unwrap();
            assert_eq!(goal.met, met, "{slower}");
            assert!(goal.words.contains("220 ns"), "{}", goal.words);
        }
    }

    #[test]
    fn every_batch_is_measured_at_one_of_the_turns() {
        for rounds in [1, 4, 5, 7, 25, 1000] {
            assert_eq!(turns(rounds).sum::<u32>(), rounds);
            assert!(turns(rounds).all(|batches| batches > 0));
        }
    }

    #[test]
    fn a_measurement_that_is_missing_is_an_error_even_as_a_floor() {
        for row in [
            Row::new("", "x", "other"),
            Row::new("", "x", "nop").above("other"),
        ] {
            let error = line(row, 1.0).unwrap_err();
            assert!(error.to_string().contains("other"), "{error}");
        }
    }

    #[test]
    fn every_floor_is_measured_in_the_same_machine() {
        for driver in ["soft", "virtio_gpu"] {
            for machine in machines(driver) {
                let measures = machine::measures(&machine.rows);
                for row in &machine.rows {
                    for name in row.floor.iter().chain([&row.measure]) {
                        assert!(measures.contains(name), "{} {name}", machine.run.name);
                    }
                }
            }
        }
    }
}
