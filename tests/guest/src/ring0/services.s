// What only CPL 0 can do, offered to Rust as the function ring0_service(number, first, second, third).
//
//   edi  service                       rsi        rdx           rcx        result in rax
//   0    write bytes to serial port    address    length
//   1    sleep until a u32 changes     its addr   value seen
//   2    cpuid                         leaf       subleaf       [u32; 4]
//   3    write a byte to a port        port       value
//   4    read a byte from a port       port                                value
//   5    write a 32-bit register       address    value
//   6    read a 32-bit register        address                             value
//
// The function is an invalid instruction, whose exception (traps.s) is what raises the privilege level. That works on
// every KVM; `syscall` does not: without hardware virtualization its handler still runs at CPL 3, and `int 0x80` fails.
// A service may change what a function may change in the System V ABI.

    .set SERIAL_PORT, 0x3f8

    .section .text.services, "ax"
    .global ring0_service
    .balign 16
ring0_service:
    ud2
    ret

// Invalid instruction. On the stack: rip, cs, rflags, rsp, ss.
invalid_opcode:
    lea rax, [rip + ring0_service]
    cmp [rsp], rax
    jne 1f
    add qword ptr [rsp], 2                  // continue behind ud2
    cmp edi, 1
    jb service_serial
    je service_sleep
    cmp edi, 3
    jb service_cpuid
    je service_port_write
    cmp edi, 5
    jb service_port_read
    je service_register_write
    cmp edi, 6
    je service_register_read
1:  push 0
    push INVALID_OPCODE
    jmp exception

// One exit per byte. The transmitter is not asked whether it is ready: a virtual one always is.
service_serial:
    mov rcx, rdx
    mov edx, SERIAL_PORT
    rep outsb
    iretq

// Interrupts stay off between the look at the counter and hlt, so that no wake-up is lost.
service_sleep:
    cli
    cmp dword ptr [rsi], edx
    jne 1f
    sti
    hlt
    jmp service_sleep
1:  iretq

service_cpuid:
    mov r8, rcx
    mov eax, esi
    mov ecx, edx
    push rbx
    cpuid
    mov [r8], eax
    mov [r8 + 4], ebx
    mov [r8 + 8], ecx
    mov [r8 + 12], edx
    pop rbx
    iretq

service_port_write:
    mov eax, edx
    mov edx, esi
    out dx, al
    iretq

service_port_read:
    mov edx, esi
    xor eax, eax
    in al, dx
    iretq

service_register_write:
    mov [rsi], edx
    iretq

service_register_read:
    mov eax, [rsi]
    iretq
