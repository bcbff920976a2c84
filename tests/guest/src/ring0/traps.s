// Exceptions and interrupts. An exception is handed to Rust (`exception_raised`, at CPL 3, on a stack of its own); a second one,
// while the first is being reported, ends the VM at once. An interrupt is counted and acknowledged, no more: whoever
// waits for it looks at its counter.

    .set FIRST_INTERRUPT, 32
    .set SPURIOUS, 63
    .set INVALID_OPCODE, 6
    .set LAPIC_EOI, 0xfee000b0
    .set EXIT_NESTED_EXCEPTION, 255

    .section .text.traps, "ax"

    .balign 16
vector_stubs:
    .set vector, 0
    .rept VECTORS
    .balign STUB_SIZE
    .if vector >= FIRST_INTERRUPT
    .if vector == SPURIOUS
    iretq                                   // never acknowledged (Intel SDM volume 3, 11.9)
    .else
    push rax
    mov eax, vector
    jmp interrupt
    .endif
    .elseif vector == INVALID_OPCODE
    jmp invalid_opcode                      // how Rust asks for a service (services.s)
    .else
    // 8, 10..14, 17, 21, 29 and 30 push an error code themselves
    .if ((0x60227d00 >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp exception
    .endif
    .set vector, vector + 1
    .endr

interrupt:
    push rdx
    lea rdx, [rip + interrupt_counts]
    inc dword ptr [rdx + rax * 4]
    inc dword ptr [rdx]
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rdx
    pop rax
    iretq

// On the stack: vector, error code, rip, cs, rflags, rsp, ss.
exception:
    cmp byte ptr [rip + exception_pending], 0
    jne die
    mov byte ptr [rip + exception_pending], 1
    pop qword ptr [rip + exception_frame]
    pop qword ptr [rip + exception_frame + 8]
    pop qword ptr [rip + exception_frame + 16]
    pop qword ptr [rip + exception_frame + 24]
    pop qword ptr [rip + exception_frame + 32]
    pop qword ptr [rip + exception_frame + 40]
    mov rax, cr2
    mov [rip + exception_frame + 48], rax
    lea rdi, [rip + exception_frame]
    push USER_DATA
    lea rax, [rip + exception_stack - 8]    // as if called: rsp + 8 is a multiple of 16
    push rax
    push 2                                  // interrupts stay off
    push USER_CODE
    lea rax, [rip + exception_raised]
    push rax
    iretq

// Ends the VM without anybody's help: debug device, keyboard controller reset, halt.
die:
    mov rax, [rip + exit_register]
    mov dword ptr [rax], EXIT_NESTED_EXCEPTION
    mov al, 0xfe
    out 0x64, al
1:  cli
    hlt
    jmp 1b

    .section .bss
    .balign 8
exception_frame:
    .skip 56
exception_pending:
    .skip 8
// Interrupts taken so far, by vector; element 0 counts them all.
    .global interrupt_counts
interrupt_counts:
    .skip VECTORS * 4
