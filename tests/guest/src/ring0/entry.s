// The way from the boot loader to Rust at CPL 3. Entered by the Linux 64-bit boot protocol: long mode, CPL 0, the first
// gigabyte mapped one to one, rsi = address of the zero page (boot_params).

    .set CR0_VALUE, 0x80010033              // PG, WP, NE, ET, MP, PE; EM and TS clear: SSE may be used
    .set CR4_VALUE, 0x6a0                   // OSXMMEXCPT, OSFXSR, PGE, PAE
    .set FLAGS_USER, 0x202                  // IF
    .set LAPIC_LVT0, 0xfee00350
    .set LVT_MASKED, 0x10000

    .section .text.entry, "ax"
    .global _start
_start:
    cli
    cld
    lea rsp, [rip + ring0_stack]
    mov rbp, rsi

    mov eax, CR4_VALUE
    mov cr4, rax
    mov eax, CR0_VALUE
    mov cr0, rax
    lea rax, [rip + page_map]
    mov cr3, rax

    lgdt [rip + segments_pointer]
    mov eax, KERNEL_DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    push KERNEL_CODE
    lea rax, [rip + 2f]
    push rax
    retfq
2:
    // The interrupt gates: one stub of STUB_SIZE bytes per vector, DPL 0. The double fault has a stack of its own.
    lea rdi, [rip + interrupt_gates]
    lea rax, [rip + vector_stubs]
    mov ecx, VECTORS
3:  mov edx, eax
    shr edx, 16
    mov [rdi], ax
    mov dword ptr [rdi + 2], KERNEL_CODE
    mov byte ptr [rdi + 5], 0x8e
    mov [rdi + 6], dx
    add eax, STUB_SIZE
    add rdi, 16
    dec ecx
    jnz 3b
    mov byte ptr [rip + interrupt_gates + 8 * 16 + 4], 1
    lidt [rip + interrupts_pointer]

    lea rax, [rip + task_state]
    mov edx, eax
    shl rax, 16
    mov rcx, 0x890000000000                 // present, available 64-bit TSS
    or rax, rcx
    or rax, TASK_STATE_SIZE - 1
    mov [rip + task_descriptor], rax        // address bits 0..23; the image lies below 16 MiB
    mov eax, TASK_STATE
    ltr ax

    // No interrupt reaches us until Rust asks for it: both PICs masked, and their line into the local APIC too.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov eax, LAPIC_LVT0
    mov dword ptr [rax], LVT_MASKED

    mov rdi, rbp
    push USER_DATA
    push STACK_GUARD + 0x100000
    push FLAGS_USER
    push USER_CODE
    lea rax, [rip + user_entry]
    push rax
    iretq

// First instructions at CPL 3. rdi = address of the zero page.
user_entry:
    fninit
    ldmxcsr [rip + mxcsr_default]
    xor ebp, ebp
    call guest_main
    ud2

    .balign 4
mxcsr_default:
    .long 0x1f80
