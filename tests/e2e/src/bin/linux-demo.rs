//! `linux-demo`: draws a scene with `gles` on a stock Mesa natively, then in a Linux guest on the same node through pvgpu, and
//! shows both consoles. Writes both pictures side by side, and prints as its last line what was counted and measured, as
//! JSON. It runs in the testbed's L1; `cargo xtask linux-demo` starts it and draws the table.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pvgpu_e2e::drm_ioctl::{self, Kind};
use pvgpu_e2e::guest_vm::Lines;
use pvgpu_e2e::linux_demo::{self, Plan, Said};
use pvgpu_e2e::picture_file;
use pvgpu_e2e::testbed;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_mini_vmm::{Console, Counters, DumpTarget, Ending, Gpu, Vm, VmConfig};
use pvgpu_scenarios::Picture;
use serde::Serialize;

const USAGE: &str = "usage: linux-demo SCENE FRAMES SECONDS inline|worker KERNEL PICTURE.png\n\
KERNEL is a folder of /boot.";

/// RAM of the guest: the stock Mesa is unpacked there.
const MEMORY: u64 = 1 << 30;

/// As large as mini-vmm's own default.
const APERTURE: u64 = 1 << 30;

/// Pixels between the two pictures.
const GAP: u32 = 8;

/// Linux parameters of the guest.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 reboot=k mitigations=off init_on_alloc=0 \
cryptomgr.notests rdinit=/bin/linux-demo-guest";

/// The result, for `cargo xtask linux-demo`.
#[derive(Serialize)]
struct Report {
    native: Said,
    guest: Said,
    /// From `insmod` to a node that is there, in the guest's microseconds.
    module_us: u64,
    /// What one frame that is read back costs in the guest.
    frame: Frame,
}

/// Counted per frame.
#[derive(Debug, Serialize)]
struct Frame {
    requests: f64,
    doorbells: f64,
    interrupts: f64,
    /// From the guest to the VMM for a device's register; the console's are not among them.
    exits: f64,
}

/// What had been counted at one moment.
#[derive(Clone, Copy, Default)]
struct Moment {
    requests: u64,
    doorbells: u64,
    interrupts: u64,
    exits: u64,
}

impl Moment {
    fn now(counters: &Counters) -> Moment {
        let (gpu, exits) = (counters.gpu().unwrap_or_default(), counters.exits());
        Moment {
            requests: gpu.completed,
            doorbells: gpu.doorbells,
            interrupts: gpu.interrupts,
            exits: exits.mmio_reads + exits.mmio_writes,
        }
    }
}

/// What the guest's console has said so far.
#[derive(Default)]
struct Heard {
    said: Said,
    /// What had been counted when each command started: the module, the runs of `gles`, the end.
    commands: Vec<Moment>,
    module_us: Option<u64>,
    last: String,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [scene, frames, seconds, doorbell, kernel, picture] = words.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let (Ok(frames @ 2..), Ok(seconds @ 1..)) = (frames.parse(), seconds.parse()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let plan = Plan {
        scene: scene.clone(),
        frames,
        seconds,
    };
    let doorbell = match doorbell.as_str() {
        "inline" => Doorbell::Inline,
        _ => Doorbell::Worker,
    };
    let picture = PathBuf::from(picture);
    match run(plan, doorbell, kernel, &picture) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("linux-demo: {error}");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn run(plan: Plan, doorbell: Doorbell, kernel: &str, output: &Path) -> Result<(), Failure> {
    testbed::unpack_mesa()?;
    let node = drm_ioctl::find("virtio_gpu", Kind::Render)?.path;
    let node = node.to_string_lossy().into_owned();
    println!("== natively, on {node}");
    let (mut native, left) = natively(&plan, &node)?;
    println!("== in a guest with Debian's {kernel} kernel, on the same node through pvgpu");
    let (heard, right) = in_guest(&plan, &node, doorbell, kernel)?;

    println!("== natively once more: a machine that does other things, too, is not always as fast");
    gles(&plan.bench(&node), &mut native, &plan)?;

    let frame = cost(&heard.commands, plan.frames).ok_or("the guest did not run gles")?;
    picture_file::write_png(&side_by_side(&left, &right), output)
        .map_err(|error| format!("cannot write {}: {error}", output.display()))?;
    if let Some(different) = native
        .frames
        .iter()
        .zip(&heard.said.frames)
        .find(|(native, guest)| native != guest)
    {
        return Err(format!("native and guest differ: {different:?}").into());
    }
    if left != right {
        return Err("the pictures differ, although their fingerprints do not".into());
    }
    let report = Report {
        native,
        guest: heard.said,
        module_us: heard
            .module_us
            .ok_or("the guest does not say how long the module took")?,
        frame,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// What one of `frames` frames costs: what the run of all of them has counted beyond the run of one.
fn cost(commands: &[Moment], frames: u32) -> Option<Frame> {
    // The module, one frame, all frames, and what comes then.
    let [_, one, all, end, ..] = commands else {
        return None;
    };
    let cost = |count: fn(&Moment) -> u64| {
        let extra = (count(end) - count(all)).saturating_sub(count(all) - count(one));
        extra as f64 / f64::from(frames - 1)
    };
    Some(Frame {
        requests: cost(|moment| moment.requests),
        doorbells: cost(|moment| moment.doorbells),
        interrupts: cost(|moment| moment.interrupts),
        exits: cost(|moment| moment.exits),
    })
}

/// All runs without a guest: what `gles` said, and the picture.
fn natively(plan: &Plan, node: &str) -> Result<(Said, Picture), Failure> {
    let file = std::env::temp_dir().join("linux-demo-native.png");
    let mut said = Said::default();
    for arguments in plan.runs(node, &file.to_string_lossy()) {
        gles(&arguments, &mut said, plan)?;
    }
    if let Some(reason) = said.incomplete(plan) {
        return Err(reason.into());
    }
    Ok((said, picture_file::read_png(&file)?))
}

/// Runs `gles` without a guest and shows what it says.
fn gles(arguments: &[String], said: &mut Said, plan: &Plan) -> Result<(), Failure> {
    println!("host  | $ gles {}", arguments.join(" "));
    let mut gles = Command::new("/bin/gles")
        .args(arguments)
        .envs(linux_demo::ENVIRONMENT)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start gles: {error}"))?;
    for line in BufReader::new(gles.stdout.take().ok_or("gles has no output")?).lines() {
        let line = line?;
        if said.line(&line, plan) {
            println!("host  | {line}");
        }
    }
    let status = gles.wait()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("gles ended with {status}").into()),
    }
}

/// All runs in a guest: what its console said, and the picture that it handed out.
fn in_guest(
    plan: &Plan,
    node: &str,
    doorbell: Doorbell,
    kernel: &str,
) -> Result<(Heard, Picture), Failure> {
    let folder = PathBuf::from("/boot").join(kernel);
    let mut config = VmConfig::new(folder.join("vmlinux"));
    config.initrd = vec![folder.join("l2.cpio"), PathBuf::from(testbed::MESA)];
    config.memory = MEMORY;
    config.cmdline = format!("{PARAMETERS} {}", plan.command_line());
    config.gpu = Some(Gpu::InProcess {
        driver: Arc::new(DrmDriver::new(node)?),
        aperture: APERTURE,
        device: DeviceConfig {
            doorbell,
            ..DeviceConfig::default()
        },
    });
    config.dump = Some(DumpTarget::Memory);
    let counters: Arc<OnceLock<Counters>> = Arc::default();
    let heard: Arc<Mutex<Heard>> = Arc::default();
    let (seen, count, spoken) = (Arc::clone(&heard), Arc::clone(&counters), plan.clone());
    config.console = Console::output(Lines::new(move |line| {
        let mut heard = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.said.line(line, &spoken) {
            let _ = writeln!(io::stdout(), "guest | {line}");
        }
        if let (true, Some(counters)) = (line.starts_with("$ "), count.get()) {
            heard.commands.push(Moment::now(counters));
        } else if let Some(us) = module_us(line) {
            heard.module_us = Some(us);
        }
        line.clone_into(&mut heard.last);
    }));
    let vm = Vm::new(config)?;
    let _ = counters.set(vm.counters());
    let outcome = vm.run()?;
    let heard = std::mem::take(&mut *heard.lock().unwrap_or_else(PoisonError::into_inner));
    if outcome.ending != (Ending::Exit { code: 0 }) {
        let last = &heard.last;
        return Err(format!(
            "the guest ended badly ({:?}) after `{last}`",
            outcome.ending
        )
        .into());
    }
    if let Some(reason) = heard.said.incomplete(plan) {
        return Err(format!("in the guest, {reason}").into());
    }
    let png = outcome.dump.ok_or("the guest handed no picture out")?;
    let picture = picture_file::decode_png(io::Cursor::new(png))?;
    Ok((heard, picture))
}

/// The time in the line `/dev/dri/... is there after N us`.
fn module_us(line: &str) -> Option<u64> {
    let (_, time) = line.split_once(" is there after ")?;
    time.strip_suffix(" us")?.parse().ok()
}

/// Two pictures of the same height in one, with a white gap.
fn side_by_side(left: &Picture, right: &Picture) -> Picture {
    let mut rgba = Vec::new();
    for row in 0..left.height.max(right.height) {
        let columns = |picture: &Picture| {
            let pixels = (0..picture.width).map(|column| picture.pixel(column, row));
            pixels.collect::<Vec<_>>().into_flattened()
        };
        rgba.extend(columns(left));
        rgba.extend([0xff; 4].repeat(GAP as usize));
        rgba.extend(columns(right));
    }
    Picture {
        width: left.width + GAP + right.width,
        height: left.height.max(right.height),
        rgba,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_costs_what_many_frames_cost_beyond_one() {
        let moments = [0, 100, 150, 250].map(|requests| Moment {
            requests,
            ..Moment::default()
        });
        assert_eq!(cost(&moments, 11).unwrap().requests, 5.0);
        assert!(cost(&moments[..3], 11).is_none());
    }

    #[test]
    fn the_time_of_the_module_is_read_from_its_line() {
        let line = "/dev/dri/renderD128 is there after 4711 us";
        assert_eq!(module_us(line), Some(4711));
        assert_eq!(module_us("is there after lunch"), None);
    }

    #[test]
    fn pictures_side_by_side_keep_their_pixels() {
        let picture = |value| Picture {
            width: 2,
            height: 1,
            rgba: vec![value; 8],
        };
        let both = side_by_side(&picture(1), &picture(2));
        assert_eq!((both.width, both.height), (4 + GAP, 1));
        assert_eq!(both.rgba.len(), (4 + GAP as usize) * 4);
        let pixels = [0, 2, 2 + GAP].map(|column| both.pixel(column, 0)[0]);
        assert_eq!(pixels, [1, 0xff, 2]);
    }
}
