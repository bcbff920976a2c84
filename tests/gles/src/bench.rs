//! What frames of a scene cost: drawn, drawn and read back, and the processor's part of the latter alone. `main.rs` prints
//! the result. A guest's share of what is lost is told apart by the last one, which does the same work and no GPU's.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::scene::{Entry, Failure, Stage};

/// Frames of different numbers before they start again.
const FRAMES: u32 = 32;

/// Frames that the GPU may be behind when none is read back, as for a program that shows them.
const AHEAD: u32 = 2;

/// Frames and the time that they took.
pub struct Rate {
    /// How many.
    pub frames: u32,
    /// How long.
    pub time: Duration,
}

impl Rate {
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

/// Measures each of the three for `time`.
pub fn measure(node: Option<PathBuf>, entry: &Entry, time: Duration) -> Result<Measured, Failure> {
    let stage = Stage::new(node, entry)?;
    let mut scene = (entry.make)(&stage)?;
    // Shaders are compiled when they are first used: not a part of a frame.
    let numbers = scene.compute(0);
    scene.draw(&stage.canvas, &numbers)?;
    let picture = scene.picture(&stage.canvas)?;
    let draw = repeat(time, |frame| {
        let numbers = scene.compute(frame);
        scene.draw(&stage.canvas, &numbers)?;
        match frame % AHEAD {
            0 => stage.gl.finish(),
            _ => stage.gl.flush(),
        }
        Ok(())
    })?;
    let read = repeat(time, |frame| {
        let numbers = scene.compute(frame);
        scene.draw(&stage.canvas, &numbers)?;
        black_box(scene.picture(&stage.canvas)?.fingerprint());
        Ok(())
    })?;
    let processor = repeat(time, |frame| {
        black_box(scene.compute(frame));
        black_box(black_box(&picture).fingerprint());
        Ok(())
    })?;
    stage.gl.check("measuring")?;
    Ok(Measured {
        renderer: stage.gl.renderer(),
        draw,
        read,
        processor,
    })
}

/// Does `frame` again and again for at least `time`.
fn repeat(
    time: Duration,
    mut frame: impl FnMut(u32) -> Result<(), Failure>,
) -> Result<Rate, Failure> {
    let start = Instant::now();
    let mut frames = 0;
    while frames == 0 || start.elapsed() < time {
        frame(frames % FRAMES)?;
        frames += 1;
    }
    Ok(Rate {
        frames,
        time: start.elapsed(),
    })
}
