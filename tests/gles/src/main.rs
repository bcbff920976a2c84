//! `gles`: an ordinary OpenGL ES program on a stock Mesa. It draws scenes without a window and says what each frame's
//! picture is, in one word; the same words in a guest and natively mean the same pictures. It knows nothing of pvgpu.
//!
//! The tests in the testbed and `cargo xtask linux-demo` run it on both sides; people run it to try a guest's GPU.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use pvgpu_scenarios::Picture;
use serde_json::json;

mod bench;
mod egl;
mod gbm;
mod geometry;
mod gl;
mod scene;
mod scenes;
mod sharing;

use scene::{Entry, Failure, SCENES, Stage};

/// Draw OpenGL ES scenes without a window, and print a fingerprint of each frame's picture
#[derive(Parser)]
#[command(
    version,
    after_help = "Prints `renderer NAME, VERSION`, then a line `SCENE FRAME FINGERPRINT` per frame (FNV-1a, 64 bits).\n\
Needs Debian's packages libegl1, libegl-mesa0, libgbm1 and libgl1-mesa-dri.\n\n\
Exit code 0: all was drawn. 1: something was not drawn, or was wrong. 2: the command line is wrong, or this machine lacks \
a library or the node."
)]
struct Arguments {
    /// The DRM node to draw on; `none` draws on the processor, without buffer sharing
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/dev/dri/renderD128",
        global = true
    )]
    node: PathBuf,

    /// The scene, or `all`
    #[arg(long, value_name = "NAME", global = true)]
    scene: Option<String>,

    /// How many frames of each scene
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    frames: u32,

    /// List the scenes and exit
    #[arg(long)]
    list: bool,

    /// Write the last frame's picture to this file
    #[arg(long, value_name = "FILE.png")]
    picture: Option<PathBuf>,

    /// Print one JSON object instead of lines
    #[arg(long, global = true)]
    json: bool,

    /// Draw the same frames again until so many seconds have passed, and fail if one differs; of `bench`, the time of each
    /// measurement (default 2)
    #[arg(long, value_name = "S", global = true, value_parser = seconds)]
    seconds: Option<Duration>,

    #[command(subcommand)]
    mode: Option<Mode>,
}

#[derive(Subcommand)]
enum Mode {
    /// Measure frames per second: drawn, drawn and read back, and of the processor's part alone
    Bench,
    /// What the scenes sharing and export start
    #[command(name = sharing::SECOND_PROCESS, hide = true)]
    SecondProcess,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "that is no number".to_owned())?;
    match seconds > 0.0 && seconds <= 86400.0 {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err("it must be more than 0 and at most 86400".to_owned()),
    }
}

/// Why the program ends early.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The command line names no scene of ours.
    #[error("there is no scene `{0}`: `gles --list` names them")]
    NoScene(String),
    /// The scene cannot be drawn without a node.
    #[error("the scene {0} shares buffers, which needs a DRM node: leave out `--node none`")]
    NeedsNode(&'static str),
    /// The stage could not be set: this machine lacks something.
    #[error("{0}")]
    Stage(Failure),
    /// A scene failed.
    #[error("{scene}: {failure}")]
    Scene {
        /// Which one.
        scene: &'static str,
        /// Why.
        failure: Failure,
    },
    /// A frame that was drawn again is not the same.
    #[error("{scene}: frame {frame} is {now:016x} when drawn again, and was {first:016x}")]
    Differs {
        /// Which scene.
        scene: &'static str,
        /// Which frame of it.
        frame: usize,
        /// Its first fingerprint.
        first: u64,
        /// Its last one.
        now: u64,
    },
    /// The picture could not be written.
    #[error("cannot write {path}: {source}; say with --picture FILE.png where it may go")]
    Picture {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Standard output is full or closed.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let error = match run(&arguments) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) => error,
    };
    let code = match &error {
        // Who closed it has seen enough.
        Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Error::NoScene(_) | Error::NeedsNode(_) | Error::Stage(_) => 2,
        _ => 1,
    };
    eprintln!("gles: {error}");
    ExitCode::from(code)
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut output = io::stdout().lock();
    if arguments.list {
        for entry in SCENES {
            writeln!(output, "{:13} {}", entry.name, entry.about)?;
        }
        return Ok(());
    }
    let node = (arguments.node != Path::new("none")).then(|| arguments.node.clone());
    match arguments.mode {
        None => draw(arguments, node, &mut output),
        Some(Mode::Bench) => measure(arguments, node, &mut output),
        Some(Mode::SecondProcess) => {
            sharing::second_process(node.as_deref()).map_err(|failure| Error::Scene {
                scene: sharing::SECOND_PROCESS,
                failure,
            })
        }
    }
}

/// The scenes that the command line asks for, `default` if it says nothing.
fn chosen(arguments: &Arguments, default: &str, node: bool) -> Result<Vec<&'static Entry>, Error> {
    let name = arguments.scene.as_deref().unwrap_or(default);
    if name == "all" {
        let (chosen, left): (Vec<_>, Vec<_>) = SCENES.iter().partition(|entry| node || !entry.node);
        for entry in left {
            eprintln!("gles: without {}: it needs a DRM node", entry.name);
        }
        return Ok(chosen);
    }
    match SCENES.iter().find(|entry| entry.name == name) {
        None => Err(Error::NoScene(name.to_owned())),
        Some(entry) if entry.node && !node => Err(Error::NeedsNode(entry.name)),
        Some(entry) => Ok(vec![entry]),
    }
}

/// Draws the frames of each scene and says what they are.
fn draw(
    arguments: &Arguments,
    node: Option<PathBuf>,
    output: &mut impl Write,
) -> Result<(), Error> {
    let chosen = chosen(arguments, "all", node.is_some())?;
    if let Some(path) = &arguments.picture {
        // Before anything is drawn for nobody.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        file.map_err(|source| Error::Picture {
            path: path.clone(),
            source,
        })?;
    }
    let start = Instant::now();
    let mut renderer = None;
    let mut last = None;
    let mut scenes = Vec::new();
    for entry in &chosen {
        let stage = Stage::new(node.clone(), entry).map_err(Error::Stage)?;
        if renderer.is_none() {
            let (name, version) = stage.gl.renderer();
            if !arguments.json {
                writeln!(output, "renderer {name}, {version}")?;
            }
            renderer = Some((name, version));
        }
        let (fingerprints, picture) =
            frames(
                &stage,
                entry,
                arguments,
                |frame, fingerprint| match arguments.json {
                    true => Ok(()),
                    false => writeln!(output, "{} {frame} {fingerprint:016x}", entry.name),
                },
            )?;
        last = Some(picture);
        scenes.push((*entry, fingerprints));
    }
    if let Some(time) = arguments.seconds {
        while start.elapsed() < time {
            for (entry, first) in &scenes {
                let stage = Stage::new(node.clone(), entry).map_err(Error::Stage)?;
                let (again, _) = frames(&stage, entry, arguments, |_, _| Ok(()))?;
                let differs = first.iter().zip(&again).position(|(a, b)| a != b);
                if let Some(frame) = differs {
                    return Err(Error::Differs {
                        scene: entry.name,
                        frame,
                        first: first[frame],
                        now: again[frame],
                    });
                }
            }
        }
    }
    if let (Some(path), Some(picture)) = (&arguments.picture, last) {
        write_png(&picture, path).map_err(|source| Error::Picture {
            path: path.clone(),
            source,
        })?;
    }
    if arguments.json {
        let (name, version) = renderer.unwrap_or_default();
        let scenes: Vec<_> = scenes
            .iter()
            .map(|(entry, fingerprints)| {
                let words: Vec<_> = fingerprints
                    .iter()
                    .map(|word| format!("{word:016x}"))
                    .collect();
                json!({ "name": entry.name, "frames": words })
            })
            .collect();
        let object = json!({ "renderer": name, "version": version, "scenes": scenes });
        writeln!(output, "{object}")?;
    }
    Ok(())
}

/// Draws the frames of one scene: the fingerprint of each, and the last picture.
fn frames(
    stage: &Stage,
    entry: &Entry,
    arguments: &Arguments,
    mut drawn: impl FnMut(u32, u64) -> io::Result<()>,
) -> Result<(Vec<u64>, Picture), Error> {
    let failed = |failure| Error::Scene {
        scene: entry.name,
        failure,
    };
    let mut scene = (entry.make)(stage).map_err(failed)?;
    let mut fingerprints = Vec::new();
    let mut last = None;
    for frame in 0..arguments.frames {
        let numbers = scene.compute(frame);
        scene.draw(&stage.canvas, &numbers).map_err(failed)?;
        let picture = scene.picture(&stage.canvas).map_err(failed)?;
        let fingerprint = picture.fingerprint();
        drawn(frame, fingerprint)?;
        fingerprints.push(fingerprint);
        last = Some(picture);
    }
    let last = last.expect("the command line has at least one frame");
    Ok((fingerprints, last))
}

/// Measures one scene.
fn measure(
    arguments: &Arguments,
    node: Option<PathBuf>,
    output: &mut impl Write,
) -> Result<(), Error> {
    let time = arguments.seconds.unwrap_or(Duration::from_secs(2));
    let mut results = Vec::new();
    for entry in chosen(arguments, "framebuffers", node.is_some())? {
        let measured =
            bench::measure(node.clone(), entry, time).map_err(|failure| Error::Scene {
                scene: entry.name,
                failure,
            })?;
        let rates = [
            ("draw", &measured.draw),
            ("read", &measured.read),
            ("processor", &measured.processor),
        ];
        if !arguments.json {
            if results.is_empty() {
                let (name, version) = &measured.renderer;
                writeln!(output, "renderer {name}, {version}")?;
            }
            for (what, rate) in rates {
                let (name, per_second) = (entry.name, rate.per_second());
                writeln!(
                    output,
                    "{name} {what} {per_second:.1} frames/s ({} frames)",
                    rate.frames
                )?;
            }
        }
        let rates: serde_json::Map<_, _> = rates
            .iter()
            .map(|(what, rate)| {
                let seconds = rate.time.as_secs_f64();
                (
                    (*what).to_owned(),
                    json!({ "frames": rate.frames, "seconds": seconds }),
                )
            })
            .collect();
        let (name, version) = &measured.renderer;
        results.push(json!({
            "scene": entry.name, "renderer": name, "version": version, "rates": rates,
        }));
    }
    if arguments.json {
        writeln!(output, "{}", json!({ "measured": results }))?;
    }
    Ok(())
}

fn write_png(picture: &Picture, path: &Path) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut encoder = png::Encoder::new(&mut file, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgba)?;
    writer.finish()?;
    file.flush()
}
