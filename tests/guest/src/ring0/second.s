// The way of a second processor to Rust at CPL 3. It starts in real mode at the page that the startup interrupt names
// (Intel SDM volume 3, 8.4.4), where Rust has copied the bytes between second_start and second_end.
//
// It takes no interrupt and has no task state: an exception there is a triple fault, which ends the VM.

    .set SECOND_EFER, 0xc0000080
    .set SECOND_EFER_LME, 0x100
    .set SECOND_SEGMENTS, 0x80              // where the page has what lgdt takes
    .set SECOND_PAGE_MAP, 0x88              // and what goes into CR3

    .section .rodata.second, "a"
    .global second_start
    .global second_end
    .balign 16
second_start:
    .code16
    cli
    mov ax, cs
    mov ds, ax
    mov bx, SECOND_SEGMENTS
    lgdtd [bx]
    mov eax, CR4_VALUE
    mov cr4, eax
    mov bx, SECOND_PAGE_MAP
    mov eax, [bx]
    mov cr3, eax
    mov ecx, SECOND_EFER
    xor edx, edx
    mov eax, SECOND_EFER_LME
    wrmsr
    mov eax, CR0_VALUE
    mov cr0, eax
    .byte 0x66, 0xea                        // jmp KERNEL_CODE:second_long
    .long second_long
    .short KERNEL_CODE
    .org second_start + SECOND_SEGMENTS
    .short segments_end - segments - 1
    .long segments
    .org second_start + SECOND_PAGE_MAP
    .long page_map
second_end:

    .section .text.second, "ax"
    .code64
second_long:
    mov eax, KERNEL_DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    lea rsp, [rip + second_stack]
    push USER_DATA
    lea rax, [rip + second_stack]
    push rax
    push 2                                  // interrupts stay off
    push USER_CODE
    lea rax, [rip + second_user]
    push rax
    iretq
second_user:
    fninit
    ldmxcsr [rip + mxcsr_default]
    xor ebp, ebp
    call second_main
    ud2

    .section .bss
    .balign 16
    .skip 16384
second_stack:
