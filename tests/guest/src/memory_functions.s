// memcpy, memmove, memset, memcmp and bcmp for the System V ABI, with SSE2. rdi, rsi, rdx in; rax out.

    .section .text.memory_functions, "ax"
    .global memcpy, memmove, memset, memcmp, bcmp, _Unwind_Resume, rust_eh_personality

// Ranges may overlap: whatever is stored last is loaded before anything is stored.
    .balign 16
memcpy:
memmove:
    mov rax, rdi
    cmp rdx, 16
    jb 4f
    cmp rdx, 32
    ja 1f
    movups xmm0, [rsi]
    movups xmm1, [rsi + rdx - 16]
    movups [rdi], xmm0
    movups [rdi + rdx - 16], xmm1
    ret
1:  cmp rdx, 64
    ja 2f
    movups xmm0, [rsi]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi + rdx - 32]
    movups xmm3, [rsi + rdx - 16]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + rdx - 32], xmm2
    movups [rdi + rdx - 16], xmm3
    ret
2:  mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jb 6f
    // Forwards, 64 bytes at a time; the last 64 at the end.
    movups xmm4, [rsi + rdx - 64]
    movups xmm5, [rsi + rdx - 48]
    movups xmm6, [rsi + rdx - 32]
    movups xmm7, [rsi + rdx - 16]
    lea r8, [rdi + rdx - 64]
    .balign 16
3:  movups xmm0, [rsi]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi + 32]
    movups xmm3, [rsi + 48]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + 32], xmm2
    movups [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    cmp rdi, r8
    jb 3b
    movups [r8], xmm4
    movups [r8 + 16], xmm5
    movups [r8 + 32], xmm6
    movups [r8 + 48], xmm7
    ret
    // Fewer than 16 bytes.
4:  cmp edx, 8
    jb 5f
    mov rcx, [rsi]
    mov r8, [rsi + rdx - 8]
    mov [rdi], rcx
    mov [rdi + rdx - 8], r8
    ret
5:  cmp edx, 4
    jb 8f
    mov ecx, [rsi]
    mov r8d, [rsi + rdx - 4]
    mov [rdi], ecx
    mov [rdi + rdx - 4], r8d
    ret
8:  test edx, edx
    jz 9f
    movzx ecx, byte ptr [rsi]
    movzx r8d, byte ptr [rsi + rdx - 1]
    mov r9, rdx
    shr r9, 1
    movzx r10d, byte ptr [rsi + r9]
    mov [rdi], cl
    mov [rdi + r9], r10b
    mov [rdi + rdx - 1], r8b
9:  ret
    // Backwards: the destination starts inside of the source. The first 64 at the end.
6:  movups xmm4, [rsi]
    movups xmm5, [rsi + 16]
    movups xmm6, [rsi + 32]
    movups xmm7, [rsi + 48]
    .balign 16
7:  movups xmm0, [rsi + rdx - 64]
    movups xmm1, [rsi + rdx - 48]
    movups xmm2, [rsi + rdx - 32]
    movups xmm3, [rsi + rdx - 16]
    movups [rdi + rdx - 64], xmm0
    movups [rdi + rdx - 48], xmm1
    movups [rdi + rdx - 32], xmm2
    movups [rdi + rdx - 16], xmm3
    sub rdx, 64
    cmp rdx, 64
    ja 7b
    movups [rdi], xmm4
    movups [rdi + 16], xmm5
    movups [rdi + 32], xmm6
    movups [rdi + 48], xmm7
    ret

    .balign 16
memset:
    mov rax, rdi
    movzx ecx, sil
    cmp rdx, 16
    jb 3f
    movd xmm0, ecx
    punpcklbw xmm0, xmm0
    pshuflw xmm0, xmm0, 0
    pshufd xmm0, xmm0, 0
    lea r8, [rdi + rdx - 16]
    sub rdx, 64
    jb 2f
    .balign 16
1:  movups [rdi], xmm0
    movups [rdi + 16], xmm0
    movups [rdi + 32], xmm0
    movups [rdi + 48], xmm0
    add rdi, 64
    sub rdx, 64
    jae 1b
2:  cmp rdi, r8
    jae 5f
    movups [rdi], xmm0
    add rdi, 16
    jmp 2b
5:  movups [r8], xmm0
    ret
3:  test edx, edx
    jz 4f
    mov [rdi], cl
    inc rdi
    dec edx
    jmp 3b
4:  ret

    .balign 16
bcmp:
memcmp:
    xor ecx, ecx
1:  lea r8, [rcx + 16]
    cmp r8, rdx
    ja 2f
    movups xmm0, [rdi + rcx]
    movups xmm1, [rsi + rcx]
    pcmpeqb xmm0, xmm1
    pmovmskb eax, xmm0
    xor eax, 0xffff
    jnz 3f
    mov rcx, r8
    jmp 1b
2:  cmp rcx, rdx
    jae 5f
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    jz 2b
    ret
3:  bsf eax, eax
    add rcx, rax
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    sub eax, r8d
    ret
5:  xor eax, eax
    ret

// Named by the landing pads of the prebuilt `alloc`, which nothing enters: a panic ends the VM.
_Unwind_Resume:
rust_eh_personality:
    ud2
