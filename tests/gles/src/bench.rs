//! What frames of a scene cost: drawn, drawn and read back, and the processor's part of the latter alone. `main.rs` prints
//! the result. A guest's share of what is lost is told apart by the last one, which does the same work and no GPU's.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::gl::Gl;
use crate::scene::{Entry, Failure, Stage};

/// Frames of different numbers before they start again.
const FRAMES: u32 = 32;

/// Frames that the GPU may be behind when none is read back, as for a program that shows them.
const AHEAD: u32 = 2;

/// Frames and the time that they took.
#[derive(Clone, Copy)]
pub struct Rate {
    /// How many.
    pub frames: u32,
    /// How long.
    pub time: Duration,
}

impl Rate {
    /// Slower than all that was measured.
    const NONE: Rate = Rate {
        frames: 0,
        time: Duration::MAX,
    };

    /// Frames per second.
    pub fn per_second(&self) -> f64 {
        f64::from(self.frames) / self.time.as_secs_f64()
    }
}

/// What was measured of a scene.
pub struct Measured {
    /// `GL_RENDERER` and `GL_VERSION`.
    pub renderer: (String, String),
    /// Computed and drawn.
    pub draw: Rate,
    /// Computed, drawn, read back and fingerprinted.
    pub read: Rate,
    /// Computed and a picture fingerprinted: what of `read` is neither the driver nor the GPU.
    pub processor: Rate,
}

/// Rounds in which the three measurements take turns, so that they meet the same disturbances.
const ROUNDS: u32 = 5;

/// Measures each of the three for `time` in all; the best of its rounds counts, since whatever
/// disturbs a round makes it slower.
pub fn measure(node: Option<PathBuf>, entry: &Entry, time: Duration) -> Result<Measured, Failure> {
    let stage = Stage::new(node, entry)?;
    let mut scene = (entry.make)(&stage)?;
    // Shaders are compiled when they are first used: not a part of a frame.
    let numbers = scene.compute(0);
    scene.draw(&stage.canvas, &numbers)?;
    let picture = scene.picture(&stage.canvas)?;
    let mut best = [Rate::NONE; 3];
    for _ in 0..ROUNDS {
        let drawn = repeat(&stage.gl, time / ROUNDS, |frame| {
            let numbers = scene.compute(frame);
            scene.draw(&stage.canvas, &numbers)?;
            match frame % AHEAD {
                0 => stage.gl.finish(),
                _ => stage.gl.flush(),
            }
            Ok(())
        })?;
        let read_back = repeat(&stage.gl, time / ROUNDS, |frame| {
            let numbers = scene.compute(frame);
            scene.draw(&stage.canvas, &numbers)?;
            black_box(scene.picture(&stage.canvas)?.fingerprint());
            Ok(())
        })?;
        let computed = repeat(&stage.gl, time / ROUNDS, |frame| {
            black_box(scene.compute(frame));
            black_box(black_box(&picture).fingerprint());
            Ok(())
        })?;
        for (best, now) in best.iter_mut().zip([drawn, read_back, computed]) {
            if now.per_second() > best.per_second() {
                *best = now;
            }
        }
    }
    let [draw, read, processor] = best;
    stage.gl.check("measuring")?;
    Ok(Measured {
        renderer: stage.gl.renderer(),
        draw,
        read,
        processor,
    })
}

/// Does `frame` again and again for at least `time`, and waits until the GPU has done all of it.
fn repeat(
    gl: &Gl,
    time: Duration,
    mut frame: impl FnMut(u32) -> Result<(), Failure>,
) -> Result<Rate, Failure> {
    let start = Instant::now();
    let mut frames = 0;
    while frames == 0 || start.elapsed() < time {
        frame(frames % FRAMES)?;
        frames += 1;
    }
    gl.finish();
    Ok(Rate {
        frames,
        time: start.elapsed(),
    })
}
