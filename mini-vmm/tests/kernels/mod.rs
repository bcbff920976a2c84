//! Hand-made kernels of a few dozen instructions, wrapped as ELF, ELF with a PVH note, or bzImage.
//!
//! The boot and command-line tests run them. They use nothing but ports, the debug device and what
//! the boot protocol hands them.

#![allow(unsafe_code, dead_code)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident, $code:literal) => {
        core::arch::global_asm!(concat!(
            ".pushsection .rodata.kernels,\"a\"\n.global ", stringify!($start), "\n.global ", stringify!($end), "\n",
            stringify!($start), ":\n", $code, "\n", stringify!($end), ":\n.popsection"
        ));
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            // SAFETY: the two labels enclose the bytes that the assembler placed in this section.
            unsafe {
                let start = &raw const $start;
                std::slice::from_raw_parts(start, (&raw const $end).offset_from_unsigned(start))
            }
        }
    };
}

kernel!(
    /// 64-bit Linux boot protocol: prints its command line, a line feed and its initrd; exits with 42.
    linux_reporter, linux_reporter_start, linux_reporter_end, r#"
    mov edx, 0x3f8
    mov ebx, [rsi + 0x228]
1:  mov al, [rbx]
    test al, al
    jz 2f
    out dx, al
    inc rbx
    jmp 1b
2:  mov al, 10
    out dx, al
    mov ebx, [rsi + 0x218]
    mov ecx, [rsi + 0x21c]
3:  test ecx, ecx
    jz 4f
    mov al, [rbx]
    out dx, al
    inc rbx
    dec ecx
    jmp 3b
4:  mov edi, 0xd0001000
    mov dword ptr [rdi], 42
5:  jmp 5b
"#);

kernel!(
    /// PVH: prints its command line, a line feed and its first module; exits with 43, or with 1 where
    /// the start information has the wrong magic.
    pvh_reporter, pvh_reporter_start, pvh_reporter_end, r#"
    .code32
    mov edi, 0xd0001000
    mov eax, 1
    cmp dword ptr [ebx], 0x336ec578
    jne 5f
    mov edx, 0x3f8
    mov ecx, [ebx + 24]
1:  mov al, [ecx]
    test al, al
    jz 2f
    out dx, al
    inc ecx
    jmp 1b
2:  mov al, 10
    out dx, al
    cmp dword ptr [ebx + 12], 1
    jne 4f
    mov ebx, [ebx + 16]
    mov ecx, [ebx + 8]
    mov ebx, [ebx]
3:  test ecx, ecx
    jz 4f
    mov al, [ebx]
    out dx, al
    inc ebx
    dec ecx
    jmp 3b
4:  mov eax, 43
5:  mov [edi], eax
6:  jmp 6b
    .code64
"#);

kernel!(
    /// Echoes the serial port's input until it reads a q; exits with 0.
    echo, echo_start, echo_end, r#"
1:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 1b
    mov edx, 0x3f8
    in al, dx
    cmp al, 'q'
    je 2f
    out dx, al
    jmp 1b
2:  mov edi, 0xd0001000
    mov dword ptr [rdi], 0
3:  jmp 3b
"#);

kernel!(
    /// Prints a dot and then runs for ever.
    endless, endless_start, endless_end, r#"
    mov edx, 0x3f8
    mov al, '.'
    out dx, al
1:  jmp 1b
"#);

kernel!(
    /// Prints a dot, then halts with interrupts off: it can never wake.
    halted, halted_start, halted_end, r#"
    mov edx, 0x3f8
    mov al, '.'
    out dx, al
1:  hlt
    jmp 1b
"#);

kernel!(
    /// Executes an invalid instruction without an interrupt table: a triple fault.
    crash, crash_start, crash_end, "ud2");

kernel!(
    /// Resets the machine through the keyboard controller.
    reset, reset_start, reset_end, r#"
    mov al, 0xfe
    out 0x64, al
1:  jmp 1b
"#);

kernel!(
    /// Dumps the four words of CPUID leaf 0x40000010, then exits with the low byte of the largest hypervisor leaf.
    timing, timing_start, timing_end, r#"
    mov eax, 0x40000010
    cpuid
    mov edi, 0x200000
    mov [rdi], eax
    mov edi, 0xd0001000
    mov dword ptr [rdi + 8], 0x200000
    mov dword ptr [rdi + 12], 0
    mov dword ptr [rdi + 16], 4
    mov dword ptr [rdi + 20], 1
    mov ebx, [rdi + 20]
    test ebx, ebx
    jnz 1f
    mov eax, 0x40000000
    cpuid
    movzx ebx, al
1:  mov [rdi], ebx
2:  jmp 2b
"#);

kernel!(
    /// Makes ten bare exits (32-bit writes to the idle register), two reads, three port writes; exits with 0.
    exits, exits_start, exits_end, r#"
    mov edi, 0xd0001000
    mov ecx, 10
1:  mov [rdi + 4], ecx
    dec ecx
    jnz 1b
    mov eax, [rdi + 20]
    mov eax, [rdi + 20]
    out 0x80, al
    out 0x80, al
    out 0x80, al
    mov dword ptr [rdi], 0
2:  jmp 2b
"#);

kernel!(
    /// Writes 1, 2 and 3 to the first register of an extra device, then waits until it reads 7 there;
    /// exits with 0.
    extra_device, extra_device_start, extra_device_end, r#"
    mov edi, 0xd0002000
    mov dword ptr [rdi], 1
    mov dword ptr [rdi], 2
    mov dword ptr [rdi], 3
1:  cmp dword ptr [rdi + 4], 7
    jne 1b
    mov edi, 0xd0001000
    mov dword ptr [rdi], 0
2:  jmp 2b
"#);

kernel!(
    /// Starts all other processors by INIT and SIPI, each of which counts itself in real mode; exits with
    /// the number of processors that run when as many as AL of the first cmdline byte have come up.
    smp, smp_start, smp_end, r#"
    mov ebx, [rsi + 0x228]
    movzx ebx, byte ptr [rbx]
    sub ebx, '0'
    mov dword ptr [0x8ff8], 1
    lea rsi, [rip + 8f]
    mov edi, 0x8000
    lea rcx, [rip + 9f]
    sub rcx, rsi
1:  mov al, [rsi]
    mov [rdi], al
    inc rsi
    inc rdi
    dec ecx
    jnz 1b
    mov edi, 0xfee00000
    mov dword ptr [rdi + 0xf0], 0x1ff
    mov dword ptr [rdi + 0x300], 0x000c4500
2:  test dword ptr [rdi + 0x300], 0x1000
    jnz 2b
    mov dword ptr [rdi + 0x300], 0x000c4608
3:  mov eax, [0x8ff8]
    cmp eax, ebx
    jb 3b
    mov edi, 0xd0001000
    mov [rdi], eax
4:  jmp 4b
    .code16
8:  xor ax, ax
    mov ds, ax
    lock inc dword ptr [0x8ff8]
5:  jmp 5b
    .code64
9:
"#);

kernel!(
    /// Dumps what the GPU's transport says of itself: magic, version, device, vendor, base and length of
    /// shared-memory region 0, largest size of queue 0, first word of configuration space; exits with 0.
    gpu_registers, gpu_registers_start, gpu_registers_end, r#"
    mov edi, 0xd0000000
    mov ebx, 0x200000
    lea rsi, [rip + 7f]
    mov ebp, 10
1:  mov ecx, [rsi]
    mov eax, [rdi + rcx]
    mov [rbx], eax
    add rsi, 4
    add rbx, 4
    dec ebp
    jnz 1b
    mov edi, 0xd0001000
    mov dword ptr [rdi + 8], 0x200000
    mov dword ptr [rdi + 16], 40
    mov dword ptr [rdi + 20], 1
    mov eax, [rdi + 20]
    mov [rdi], eax
2:  jmp 2b
7:  .long 0x000, 0x004, 0x008, 0x00c, 0x0b8, 0x0bc, 0x0b0, 0x0b4, 0x034, 0x100
"#);

kernel!(
    /// Brings the GPU into operation with one empty queue of 16, rings its doorbell once and exits with
    /// the device's status.
    gpu_start, gpu_start_start, gpu_start_end, r#"
    mov edi, 0xd0000000
    lea rsi, [rip + 7f]
1:  mov ecx, [rsi]
    cmp ecx, -1
    je 2f
    mov eax, [rsi + 4]
    mov [rdi + rcx], eax
    add rsi, 8
    jmp 1b
2:  mov eax, [rdi + 0x70]
    mov edi, 0xd0001000
    mov [rdi], eax
3:  jmp 3b
7:  .long 0x70, 1,  0x70, 3
    .long 0x24, 1,  0x20, 1,  0x24, 0,  0x20, 0,  0x70, 11
    .long 0x30, 0,  0x38, 16
    .long 0x80, 0x200000,  0x84, 0,  0x90, 0x201000,  0x94, 0,  0xa0, 0x202000,  0xa4, 0
    .long 0x44, 1,  0x70, 15,  0x50, 0,  -1
"#);

kernel!(
    /// Finds the GPU on the PCI bus, enables and unmasks an MSI-X vector, brings the GPU into operation with one empty queue of
    /// 16, rings its doorbell once and exits with the device's status; with 1 where there is no GPU.
    gpu_on_pci, gpu_on_pci_start, gpu_on_pci_end, r#"
    mov ebx, 1
    mov eax, 0x80000800
    call 8f
    in eax, dx
    cmp eax, 0x107f1af4
    jne 6f
    mov eax, 0x80000840
    call 8f
    mov edx, 0xcfe
    mov eax, 0x8000
    out dx, ax
    mov eax, 0x80000810
    call 8f
    in eax, dx
    mov edi, eax
    lea rsi, [rip + 7f]
2:  mov ecx, [rsi]
    cmp ecx, -1
    je 5f
    mov edx, [rsi + 4]
    mov eax, [rsi + 8]
    add rsi, 12
    cmp edx, 2
    je 3f
    ja 4f
    mov [rdi + rcx], al
    jmp 2b
3:  mov [rdi + rcx], ax
    jmp 2b
4:  mov [rdi + rcx], eax
    jmp 2b
5:  movzx ebx, byte ptr [rdi + 0x14]
6:  mov edi, 0xd0001000
    mov [rdi], ebx
9:  jmp 9b
8:  mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    ret
7:  .long 0x4010, 4, 0xfee00000,  0x4014, 4, 0,  0x4018, 4, 0x41,  0x401c, 4, 0
    .long 0x14, 1, 1,  0x14, 1, 3
    .long 0x08, 4, 1,  0x0c, 4, 1,  0x08, 4, 0,  0x0c, 4, 0,  0x14, 1, 11
    .long 0x16, 2, 0,  0x18, 2, 16,  0x1a, 2, 1
    .long 0x20, 4, 0x200000,  0x24, 4, 0,  0x28, 4, 0x201000,  0x2c, 4, 0,  0x30, 4, 0x202000,  0x34, 4, 0
    .long 0x1c, 2, 1,  0x14, 1, 15,  0x3000, 2, 0,  -1
"#);

/// Where the code of an ELF kernel is loaded.
const LOAD: u64 = 0x10_0000;

/// An ELF file for x86-64 with `code` at its entry point.
pub fn elf(code: &[u8]) -> Vec<u8> {
    elf_file(code, None, code.len() as u64)
}

/// The same with room for `memory` bytes from its load address.
pub fn elf_of_size(code: &[u8], memory: u64) -> Vec<u8> {
    elf_file(code, None, memory)
}

/// An ELF file with a PVH note that names `code` as its 32-bit entry point.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend(4u32.to_le_bytes()); // length of the name
    note.extend(4u32.to_le_bytes()); // length of the descriptor
    note.extend(18u32.to_le_bytes()); // XEN_ELFNOTE_PHYS32_ENTRY
    note.extend(b"Xen\0");
    note.extend((LOAD as u32).to_le_bytes());
    elf_file(code, Some(&note), code.len() as u64)
}

fn elf_file(code: &[u8], note: Option<&[u8]>, memory: u64) -> Vec<u8> {
    let headers = 1 + note.is_some() as u16;
    let start = 64 + 56 * u64::from(headers);
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64-bit, little-endian
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    for field in [LOAD, 64, 0] {
        file.extend(field.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for field in [64, 56, headers, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, length: u64, memory: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes()); // read, write, execute
        for field in [offset, LOAD, LOAD, length, memory, 16] {
            file.extend(field.to_le_bytes());
        }
    };
    segment(1, start, code.len() as u64, memory);
    if let Some(note) = note {
        segment(
            4,
            start + code.len() as u64,
            note.len() as u64,
            note.len() as u64,
        );
    }
    file.extend(code);
    file.extend(note.unwrap_or_default());
    file
}

/// A bzImage of boot protocol 2.15 whose 64-bit entry point is `code` and that claims `init_size` bytes.
pub fn bzimage(code: &[u8], init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 2 * 512 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // one setup sector
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1u16.to_le_bytes()); // 64-bit entry point
    put(0x238, &255u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000u64.to_le_bytes()); // pref_address
    put(0x260, &init_size.to_le_bytes());
    file.extend(code);
    file
}

/// A file that is removed with this value.
pub struct TempFile(PathBuf);

impl TempFile {
    /// A new file with these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "mini-vmm-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &PathBuf {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether tests may use KVM: always, unless PVGPU_WITHOUT_KVM=1 says that it is known to be missing.
pub fn with_kvm() -> bool {
    let without = std::env::var_os("PVGPU_WITHOUT_KVM").is_some_and(|value| value == "1");
    if without {
        eprintln!("not run: PVGPU_WITHOUT_KVM=1");
    }
    !without
}
