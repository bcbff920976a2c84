//! Boots hand-made kernels on KVM through every boot protocol and looks at what they saw and did.

mod kernels;
mod machine;

use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use kernels::{TempFile, with_kvm};
use machine::{Screen, boot, run};
use pvgpu_mini_vmm::bus::{Attachment, Doorbell, MmioDevice};
use pvgpu_mini_vmm::{
    Console, Counters, DumpTarget, Ending, Outcome, Vm, VmConfig, check, kvm, layout,
};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn an_elf_kernel_gets_its_command_line_and_initrd_by_the_64_bit_boot_protocol() {
    if !with_kvm() {
        return;
    }
    let initrd = TempFile::new(b"ramdisk");
    let (outcome, text) = boot(&kernels::elf(kernels::linux_reporter()), |config| {
        config.cmdline = "console=ttyS0 -- last".into();
        config.initrd = vec![initrd.path().clone()];
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 42 });
    assert_eq!(outcome.exit_code, 42);
    assert_eq!(
        text,
        "console=ttyS0 pvgpu.debug=0xd0001000 -- last\nramdisk"
    );
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_point_with_an_initrd_of_two_files() {
    if !with_kvm() {
        return;
    }
    let initrd = [TempFile::new(b"ram"), TempFile::new(b"disk")];
    let (outcome, text) = boot(
        &kernels::bzimage(kernels::linux_reporter(), 1 << 20),
        |config| {
            config.cmdline = "quiet".into();
            config.initrd = initrd.iter().map(|file| file.path().clone()).collect();
        },
    );
    assert_eq!(outcome.ending, Ending::Exit { code: 42 });
    assert_eq!(text, "quiet pvgpu.debug=0xd0001000\nram\0disk");
}

#[test]
fn an_elf_kernel_with_a_pvh_note_is_entered_in_32_bit_mode_with_start_information() {
    if !with_kvm() {
        return;
    }
    let initrd = TempFile::new(b"ramdisk");
    let (outcome, text) = boot(&kernels::pvh(kernels::pvh_reporter()), |config| {
        config.cmdline = "quiet".into();
        config.initrd = vec![initrd.path().clone()];
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 43 });
    assert_eq!(text, "quiet pvgpu.debug=0xd0001000\nramdisk");
}

#[test]
fn a_machine_with_more_than_three_gib_boots() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::linux_reporter()), |config| {
        config.memory = 5 << 30
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 42 });
}

#[test]
fn console_input_reaches_the_guest_complete_and_in_order() {
    if !with_kvm() {
        return;
    }
    let text = "0123456789".repeat(30);
    let input = TempFile::new(format!("{text}q").as_bytes());
    let (outcome, printed) = boot(&kernels::elf(kernels::echo()), |config| {
        config.console.input = Some(std::fs::File::open(input.path()).unwrap());
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 0 });
    assert_eq!(printed, text);
}

#[test]
fn a_keyboard_controller_reset_ends_the_machine_with_success() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::reset()), |_| {});
    assert_eq!((outcome.ending, outcome.exit_code), (Ending::Reset, 0));
}

#[test]
fn a_triple_fault_is_a_crash_that_names_the_place() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::crash()), |_| {});
    assert_eq!(outcome.exit_code, 3);
    let Ending::TripleFault { place } = outcome.ending else {
        panic!("{:?}", outcome.ending)
    };
    assert!(place.contains("rip 0x100000, code 0f 0b"), "{place}");
}

#[test]
fn a_triple_fault_is_a_reset_where_the_command_line_asks_for_it() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::crash()), |config| {
        config.cmdline = "reboot=t".into()
    });
    assert_eq!((outcome.ending, outcome.exit_code), (Ending::Reset, 0));
}

#[test]
fn the_guest_learns_the_frequency_of_its_clock_from_cpuid() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::timing()), |config| {
        config.dump = Some(DumpTarget::Memory)
    });
    assert_eq!(
        outcome.ending,
        Ending::Exit { code: 0x10 },
        "largest hypervisor leaf"
    );
    let khz = check::check(kvm::DEVICE.as_ref(), "/nonexistent".as_ref())
        .kvm
        .tsc_khz
        .unwrap();
    assert_eq!(outcome.dump.as_deref(), Some(&khz.to_le_bytes()[..]));
}

#[test]
fn exits_are_counted_by_cause() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::exits()), |_| {});
    assert_eq!(outcome.ending, Ending::Exit { code: 0 });
    assert_eq!(outcome.exits.mmio_writes, 11);
    assert_eq!(outcome.exits.mmio_reads, 2);
    assert_eq!(outcome.exits.pio, 3);
}

#[test]
fn exits_can_be_read_while_the_machine_runs() {
    if !with_kvm() {
        return;
    }
    /// Notes how many port accesses are counted at each byte that the guest prints, by one.
    struct Watch {
        counters: Arc<OnceLock<Counters>>,
        seen: Arc<Mutex<Vec<u64>>>,
    }
    impl io::Write for Watch {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let exits = self.counters.get().unwrap().exits();
            self.seen.lock().unwrap().push(exits.pio);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let kernel = TempFile::new(&kernels::elf(kernels::linux_reporter()));
    let mut config = VmConfig::new(kernel.path());
    config.cmdline = "0123456789".into();
    let (counters, seen) = (Arc::default(), Arc::default());
    config.console = Console::output(Watch {
        counters: Arc::clone(&counters),
        seen: Arc::clone(&seen),
    });
    let vm = Vm::new(config).unwrap();
    assert!(counters.set(vm.counters()).is_ok());
    let outcome = vm.run().unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 10, "{seen:?}");
    assert!(seen.is_sorted_by(|a, b| a < b), "{seen:?}");
    let counters = counters.get().unwrap();
    assert_eq!(counters.exits(), outcome.exits);
    assert!(counters.gpu().is_none(), "there was none");
}

#[test]
fn all_processors_can_be_started() {
    if !with_kvm() {
        return;
    }
    let (outcome, _) = boot(&kernels::elf(kernels::smp()), |config| {
        config.cpus = 4;
        config.cmdline = "4".into();
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 4 });
}

/// Counts writes and reads back 7 once its doorbell has been signalled.
struct Extra {
    doorbell: Arc<EventFd>,
    written: Mutex<Vec<u32>>,
}

impl MmioDevice for Extra {
    fn read(&self, offset: u64, data: &mut [u8]) {
        assert_eq!(offset, 4);
        data.copy_from_slice(
            &if self.doorbell.read().is_ok() {
                7u32
            } else {
                0
            }
            .to_le_bytes(),
        );
    }
    fn write(&self, offset: u64, data: &[u8]) {
        assert_eq!(offset, 0);
        self.written
            .lock()
            .unwrap()
            .push(u32::from_le_bytes(data.try_into().unwrap()));
    }
}

#[test]
fn a_doorbell_of_an_extra_device_is_signalled_without_an_exit() {
    if !with_kvm() {
        return;
    }
    let doorbell = Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
    let device = Arc::new(Extra {
        doorbell: doorbell.clone(),
        written: Mutex::default(),
    });
    let attachment = Attachment {
        base: layout::EXTRA_MMIO,
        size: 0x1000,
        device: device.clone(),
        doorbells: vec![Doorbell {
            offset: 0,
            value: Some(2),
            event: doorbell,
        }],
        interrupts: vec![],
    };
    let (outcome, _) = boot(&kernels::elf(kernels::extra_device()), |config| {
        config.devices.push(attachment)
    });
    assert_eq!(outcome.ending, Ending::Exit { code: 0 });
    assert_eq!(
        *device.written.lock().unwrap(),
        [1, 3],
        "2 went to the event"
    );
    assert_eq!(outcome.exits.mmio_writes, 3);
}

/// Starts a kernel that never ends, stops it from another thread, and waits for it.
fn stop_from_outside(kernel: &[u8], cpus: u8) -> Outcome {
    let file = TempFile::new(kernel);
    let screen = Screen::default();
    let mut config = VmConfig::new(file.path());
    config.memory = 32 << 20;
    config.cpus = cpus;
    config.console = Console::output(screen.clone());
    let vm = Vm::new(config).unwrap();
    let stop = vm.stop();
    let stopper = std::thread::spawn(move || {
        while screen.text().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.end(Ending::Stopped { signal: None });
    });
    let outcome = run(vm);
    stopper.join().unwrap();
    outcome
}

#[test]
fn a_machine_whose_processors_run_halt_or_wait_can_be_stopped_from_outside() {
    if !with_kvm() {
        return;
    }
    for kernel in [kernels::endless(), kernels::halted()] {
        for cpus in [1, 3] {
            let outcome = stop_from_outside(&kernels::elf(kernel), cpus);
            assert_eq!(outcome.ending, Ending::Stopped { signal: None });
            assert_eq!(outcome.exit_code, 130);
        }
    }
}

#[test]
fn a_machine_that_is_stopped_before_it_runs_ends_at_once() {
    if !with_kvm() {
        return;
    }
    let file = TempFile::new(&kernels::elf(kernels::endless()));
    let vm = Vm::new(VmConfig::new(file.path())).unwrap();
    vm.stop().end(Ending::Stopped { signal: Some(15) });
    assert_eq!(run(vm).exit_code, 143);
}

#[test]
fn nothing_of_a_machine_is_left_in_the_process() {
    if !with_kvm() {
        return;
    }
    // In a process of its own: other tests open descriptors at the same time.
    let exe = std::env::current_exe().unwrap();
    let status = std::process::Command::new(exe)
        .args([
            "--ignored",
            "--exact",
            "many_machines_in_one_process_leave_nothing",
        ])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "nothing_of_a_machine_is_left_in_the_process runs it alone in a process"]
fn many_machines_in_one_process_leave_nothing() {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    let virtual_kib = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let once = || {
        let (outcome, _) = boot(&kernels::elf(kernels::exits()), |config| {
            config.memory = 1 << 30;
            config.cpus = 2;
        });
        assert_eq!(outcome.exit_code, 0);
    };
    once();
    let (files, threads, memory) = (count("fd"), count("task"), virtual_kib());
    for _ in 0..10 {
        once();
    }
    assert_eq!(count("fd"), files, "open files");
    assert_eq!(count("task"), threads, "threads");
    let grown = virtual_kib().saturating_sub(memory);
    assert!(
        grown < 1 << 20,
        "10 machines of 1 GiB left {grown} KiB mapped"
    );
}
