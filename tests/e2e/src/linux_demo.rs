//! What both halves of the Linux demo have in common: `linux-demo`, natively and as the host, and `linux-demo-guest`. They
//! run the same program with the same arguments, and what it says is read here.

use serde::{Deserialize, Serialize};

/// What is drawn.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A scene of `gles`.
    pub scene: String,
    /// How many frames, at least 2.
    pub frames: u32,
    /// How long each measurement takes.
    pub seconds: u32,
}

/// Where the guest's kernel command line says it, for [`Plan::of_command_line`].
const PARAMETERS: [&str; 3] = ["demo.scene=", "demo.frames=", "demo.seconds="];

impl Plan {
    /// For a guest's kernel command line.
    pub fn command_line(&self) -> String {
        let values = [
            self.scene.clone(),
            self.frames.to_string(),
            self.seconds.to_string(),
        ];
        let words: Vec<_> = PARAMETERS
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name}{value}"))
            .collect();
        words.join(" ")
    }

    /// What [`Plan::command_line`] has written.
    pub fn of_command_line(line: &str) -> Option<Plan> {
        let [scene, frames, seconds] = PARAMETERS.map(|name| {
            line.split_whitespace()
                .find_map(|word| word.strip_prefix(name))
        });
        Some(Plan {
            scene: scene?.to_owned(),
            frames: frames?.parse().ok().filter(|frames| *frames > 1)?,
            seconds: seconds?.parse().ok()?,
        })
    }

    /// The arguments of `gles`, run by run: one frame, all frames with the last one's picture in `picture`, and
    /// [`Plan::bench`]. What the second run costs beyond the first one is what `frames - 1` frames cost.
    pub fn runs(&self, node: &str, picture: &str) -> [Vec<String>; 3] {
        let words = |words: &[&str]| {
            let always = ["--node", node, "--scene", &self.scene];
            let all = always.iter().chain(words);
            all.map(|word| (*word).to_owned()).collect()
        };
        let frames = self.frames.to_string();
        [
            words(&["--frames", "1"]),
            words(&["--frames", &frames, "--picture", picture]),
            self.bench(node),
        ]
    }

    /// The arguments of `gles` that measure.
    pub fn bench(&self, node: &str) -> Vec<String> {
        let seconds = self.seconds.to_string();
        let words = ["--node", node, "--scene", &self.scene, "bench"];
        let words = words.into_iter().chain(["--seconds", &seconds, "--json"]);
        words.map(str::to_owned).collect()
    }
}

/// Each run starts with the compilation of the shaders, so that all of them are alike.
pub const ENVIRONMENT: [(&str, &str); 1] = [("MESA_SHADER_CACHE_DISABLE", "true")];

/// What `gles` has said in all runs.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Said {
    /// What draws.
    pub renderer: String,
    /// The lines `SCENE FRAME FINGERPRINT`.
    pub frames: Vec<String>,
    /// Frames per second.
    pub rates: Rates,
}

/// Frames per second, as `gles bench` measures them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Drawn.
    pub draw: f64,
    /// Drawn and read back.
    pub read: f64,
    /// Of the processor's part alone.
    pub processor: f64,
}

/// The JSON of `gles bench`.
#[derive(Deserialize)]
struct Bench {
    measured: Vec<Measured>,
}

#[derive(Deserialize)]
struct Measured {
    rates: Counted,
}

#[derive(Deserialize)]
struct Counted {
    draw: Rate,
    read: Rate,
    processor: Rate,
}

#[derive(Deserialize)]
struct Rate {
    frames: f64,
    seconds: f64,
}

impl Rate {
    fn per_second(&self) -> f64 {
        self.frames / self.seconds
    }
}

impl Said {
    /// Takes in a line of `gles`. True if it is for people, too.
    pub fn line(&mut self, line: &str, plan: &Plan) -> bool {
        if let Some(renderer) = line.strip_prefix("renderer ") {
            renderer.clone_into(&mut self.renderer);
        } else if line.starts_with(&format!("{} ", plan.scene)) {
            self.frames.push(line.to_owned());
        } else if let Ok(bench) = serde_json::from_str::<Bench>(line) {
            if let [Measured { rates }] = bench.measured.as_slice() {
                // Of several measurements, the best: whatever disturbs one makes it slower.
                let Rates {
                    draw,
                    read,
                    processor,
                } = &mut self.rates;
                *draw = draw.max(rates.draw.per_second());
                *read = read.max(rates.read.per_second());
                *processor = processor.max(rates.processor.per_second());
            }
            return false;
        }
        true
    }

    /// Why this is not what the runs of `plan` say, if it is not.
    pub fn incomplete(&self, plan: &Plan) -> Option<String> {
        // The first run has one frame more.
        let expected = plan.frames as usize + 1;
        if self.frames.len() != expected {
            return Some(format!(
                "gles has drawn {} frames, not {expected}",
                self.frames.len()
            ));
        }
        (self.rates == Rates::default()).then(|| "gles has measured nothing".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            scene: "knot".to_owned(),
            frames: 2,
            seconds: 1,
        }
    }

    #[test]
    fn the_guest_reads_the_plan_that_its_host_wrote() {
        let line = format!("console=ttyS0 {} quiet", plan().command_line());
        let read = Plan::of_command_line(&line).unwrap();
        assert_eq!(read.runs("n", "p"), plan().runs("n", "p"));
        assert!(Plan::of_command_line("demo.scene=knot demo.frames=2").is_none());
    }

    #[test]
    fn what_gles_says_is_complete_only_with_all_frames_and_rates() {
        let mut said = Said::default();
        for line in ["renderer virgl, 3", "knot 0 a", "knot 0 a", "knot 1 b"] {
            assert!(said.line(line, &plan()));
        }
        assert!(said.incomplete(&plan()).is_some());
        let rate = "{\"frames\":6,\"seconds\":2.0}";
        let bench = format!(
            "{{\"measured\":[{{\"rates\":{{\"draw\":{rate},\"read\":{rate},\"processor\":{rate}}}}}]}}"
        );
        assert!(!said.line(&bench, &plan()));
        assert_eq!(said.incomplete(&plan()), None);
        assert_eq!((said.rates.read, said.renderer.as_str()), (3.0, "virgl, 3"));
    }
}
