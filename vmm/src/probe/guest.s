// The guest of `bulkhead check`: 64-bit code without a stack frame of its own history, run at CODE with
// the first 2 MiB identity-mapped (see machine.rs for the map). It lives in a read-only data section of
// the host binary and is copied into guest memory, so only RIP-relative and constant addresses work here.
//
// Register r15 holds the address of the data block during the whole run, in ring 3 and handlers too.
// Every step reports by port: BEGIN first, then PASS or WRONG or NOT_OFFERED, with the step's number in al.
// An exception nobody asked for goes to EXCEPTION with its vector; DONE ends the run.
//
// Words in braces are constants filled in by guest.rs.

    .pushsection .rodata.bulkhead_probe, "a", @progbits
    .balign 16
    .globl bulkhead_probe_guest_start
    .globl bulkhead_probe_guest_end

    .macro begin step
    mov al, \step
    out {PORT_BEGIN}, al
    .endm

    .macro pass step
    mov al, \step
    out {PORT_PASS}, al
    .endm

    // Offsets in the data block. The first bytes are zero when the guest starts.
    .set FEATURES, 0x00         // CPUID.1:ECX
    .set PSEUDO, 0x10           // operand of lgdt and lidt, 10 bytes
    .set BREAKPOINTS, 0x20      // handler run counts, 8 bytes each
    .set INVALID_OPCODES, 0x28
    .set PAGE_FAULTS, 0x30
    .set FAULT_ADDRESS, 0x38
    .set TIMER_IRQS, 0x40
    .set DEADLINE_IRQS, 0x48
    .set LINE_IRQS, 0x50
    .set SYSCALLS, 0x58
    .set USER_RING, 0x60        // CPL seen by the user code
    .set GS_VALUE, 0x68         // read through GS in the system call entry
    .set KERNEL_STACK, 0x70
    .set MARK, 0x78             // constant read through FS and GS
    .set WIDE, 0x80             // 16 bytes, 16-byte aligned, for cmpxchg16b

    .set KERNEL_CODE, 0x08
    .set KERNEL_DATA, 0x10
    .set USER_BASE, 0x18        // SYSRET takes SS = base + 8, CS = base + 16 (Intel SDM, SYSRET)
    .set USER_DATA, 0x23
    .set USER_CODE, 0x2b
    .set TASK, 0x30

    .set GATE_KERNEL, 0x8e      // present, DPL 0, 64-bit interrupt gate
    .set GATE_USER, 0xee        // the same with DPL 3

    .set VECTOR_TIMER, 0x30
    .set VECTOR_LINE, 0x31
    .set VECTOR_DEADLINE, 0x32
    .set VECTOR_USER, 0x80

    .set MSR_EFER, 0xc0000080
    .set MSR_STAR, 0xc0000081
    .set MSR_LSTAR, 0xc0000082
    .set MSR_SFMASK, 0xc0000084
    .set MSR_FS_BASE, 0xc0000100
    .set MSR_KERNEL_GS_BASE, 0xc0000102
    .set MSR_TSC_DEADLINE, 0x6e0

    .code64
bulkhead_probe_guest_start:
    mov r15d, {DATA}

    // Descriptor tables: a kernel's first act. GDT and segments, far return into our code segment, IDT, TSS.
    begin {TABLES}
    lea rax, [rip + probe_gdt]
    mov word ptr [r15 + PSEUDO], 8 * 8 - 1
    mov qword ptr [r15 + PSEUDO + 2], rax
    lgdt [r15 + PSEUDO]
    mov eax, KERNEL_DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    push KERNEL_CODE
    lea rax, [rip + probe_in_segment]
    push rax
    retfq
probe_in_segment:
    // Gates 0 to 31 lead to their stub, the rest to the last stub.
    xor edi, edi
probe_next_gate:
    mov ecx, edi
    cmp ecx, 32
    jb probe_low_vector
    mov ecx, 32
probe_low_vector:
    lea rax, [rip + probe_stubs]
    lea rax, [rax + rcx * 8]
    mov esi, GATE_KERNEL
    call probe_set_gate
    inc edi
    cmp edi, 256
    jb probe_next_gate
    mov edi, 3
    lea rax, [rip + probe_on_breakpoint]
    call probe_set_gate
    mov edi, 6
    lea rax, [rip + probe_on_invalid_opcode]
    call probe_set_gate
    mov edi, 14
    lea rax, [rip + probe_on_page_fault]
    call probe_set_gate
    mov edi, VECTOR_TIMER
    lea rax, [rip + probe_on_timer]
    call probe_set_gate
    mov edi, VECTOR_LINE
    lea rax, [rip + probe_on_line]
    call probe_set_gate
    mov edi, VECTOR_DEADLINE
    lea rax, [rip + probe_on_deadline]
    call probe_set_gate
    mov edi, VECTOR_USER
    mov esi, GATE_USER
    lea rax, [rip + probe_on_user_interrupt]
    call probe_set_gate
    mov word ptr [r15 + PSEUDO], 256 * 16 - 1
    mov qword ptr [r15 + PSEUDO + 2], {IDT}
    lidt [r15 + PSEUDO]
    mov ebx, {TSS}
    mov qword ptr [rbx + 4], {INTERRUPT_STACK}  // RSP0
    mov word ptr [rbx + 102], 104               // no I/O permission bitmap
    mov eax, TASK
    ltr ax
    pass {TABLES}

    // Port input; the host checks that reports (output) arrive.
    begin {PORT_IO}
    in al, {PORT_ECHO}
    cmp al, {ECHO_VALUE}
    mov al, {PORT_IO}
    jne probe_wrong
    pass {PORT_IO}

    begin {CPUID}
    xor eax, eax
    cpuid
    cmp eax, 1
    mov al, {CPUID}
    jb probe_wrong
    mov eax, 1
    xor ecx, ecx
    cpuid
    mov dword ptr [r15 + FEATURES], ecx
    pass {CPUID}

    // An access outside memory leaves to the host: write a value, read it back.
    begin {MMIO}
    mov ebx, {MMIO_BASE}
    mov dword ptr [rbx], 0x5aa51234
    mov eax, dword ptr [rbx]
    cmp eax, 0x5aa51234
    mov al, {MMIO}
    jne probe_wrong
    pass {MMIO}

    // A write that KVM turns into an event without leaving to the host: the way of every virtqueue kick.
    begin {IOEVENTFD}
    mov dword ptr [rbx + {MMIO_NOTIFY}], 1
    in al, {PORT_NOTIFIED}
    cmp al, 1
    mov al, {IOEVENTFD}
    jne probe_wrong
    pass {IOEVENTFD}

    begin {STRING}
    cld
    mov edi, {PAGE_A}
    mov ecx, 512
    mov rax, 0x0123456789abcdef
    rep stosq
    mov esi, {PAGE_A}
    mov edi, {PAGE_B}
    mov ecx, 4096
    rep movsb
    mov esi, {PAGE_A}
    mov edi, {PAGE_B}
    mov ecx, 4096
    repe cmpsb
    mov al, {STRING}
    jne probe_wrong
    pass {STRING}

    // EFER: long mode is on, system calls can be switched on. FS base reaches the data block.
    begin {MSR}
    mov ecx, MSR_EFER
    rdmsr
    bt eax, 10
    mov bl, {MSR}
    jnc probe_wrong_bl
    or eax, 1
    wrmsr
    rdmsr
    bt eax, 0
    jnc probe_wrong_bl
    mov rax, {MARK_VALUE}
    mov qword ptr [r15 + MARK], rax
    mov ecx, MSR_FS_BASE
    mov eax, r15d
    xor edx, edx
    wrmsr
    rdmsr
    cmp eax, r15d
    jne probe_wrong_bl
    mov rax, qword ptr fs:[MARK]
    cmp rax, qword ptr [r15 + MARK]
    jne probe_wrong_bl
    pass {MSR}

    begin {BREAKPOINT}
    int3
    cmp qword ptr [r15 + BREAKPOINTS], 1
    mov al, {BREAKPOINT}
    jne probe_wrong
    pass {BREAKPOINT}

    begin {INVALID_OPCODE}
    ud2
    cmp qword ptr [r15 + INVALID_OPCODES], 1
    mov al, {INVALID_OPCODE}
    jne probe_wrong
    pass {INVALID_OPCODE}

    // The window's first page is mapped to page A. Change the entry, flush one address, see page B; change
    // it back, flush all, see page A. Then the switches a kernel flips in CR4 and CR0.
    begin {PAGING}
    mov bl, {PAGING}
    mov edi, {WINDOW}
    mov esi, {WINDOW_TABLE}
    mov eax, {PAGE_A}
    mov qword ptr [rax], 0x1111
    mov eax, {PAGE_B}
    mov qword ptr [rax], 0x2222
    cmp qword ptr [rdi], 0x1111
    jne probe_wrong_bl
    or eax, 7
    mov dword ptr [rsi], eax
    invlpg [rdi]
    cmp qword ptr [rdi], 0x2222
    jne probe_wrong_bl
    mov dword ptr [rsi], {PAGE_A} + 7
    mov rax, cr3
    mov cr3, rax
    cmp qword ptr [rdi], 0x1111
    jne probe_wrong_bl
    mov rax, cr4
    or eax, 0x80                                // PGE
    mov cr4, rax
    mov rax, cr0
    or eax, 8                                   // TS
    mov cr0, rax
    clts
    mov rax, cr0
    test eax, 8
    jnz probe_wrong_bl
    wbinvd
    pass {PAGING}

    // The window's second page is not present; the handler maps page B there.
    begin {PAGE_FAULT}
    mov bl, {PAGE_FAULT}
    cmp qword ptr [rdi + 4096], 0x2222
    jne probe_wrong_bl
    cmp qword ptr [r15 + PAGE_FAULTS], 1
    jne probe_wrong_bl
    cmp qword ptr [r15 + FAULT_ADDRESS], {WINDOW} + 4096
    jne probe_wrong_bl
    pass {PAGE_FAULT}

    // Floating point and SSE, saved and restored the old way.
    begin {FXSAVE}
    mov bl, {FXSAVE}
    fninit
    mov edi, {FPU_AREA}
    mov rax, 0x1122334455667788
    movq xmm0, rax
    fxsave64 [rdi]
    pxor xmm0, xmm0
    fxrstor64 [rdi]
    movq rcx, xmm0
    cmp rax, rcx
    jne probe_wrong_bl
    pass {FXSAVE}

    // The same with XSAVE and XCR0, AVX included where CPUID offers it.
    begin {XSAVE}
    bt dword ptr [r15 + FEATURES], 26
    jc probe_xsave
    mov al, {XSAVE}
    out {PORT_NOT_OFFERED}, al
    jmp probe_after_xsave
probe_xsave:
    mov rax, cr4
    or eax, 0x40000                             // OSXSAVE
    mov cr4, rax
    mov eax, 13
    xor ecx, ecx
    cpuid
    and eax, 7                                  // x87, SSE, AVX
    mov esi, eax
    xor ecx, ecx
    xor edx, edx
    xsetbv
    xgetbv
    mov bl, {XSAVE}
    cmp eax, esi
    jne probe_wrong_bl
    // The area must not hold FXSAVE's image where the XSAVE header is.
    mov edi, {XSAVE_AREA}
    mov rsi, 0x8877665544332211
    movq xmm0, rsi
    mov eax, -1
    mov edx, -1
    xsave64 [rdi]
    pxor xmm0, xmm0
    xrstor64 [rdi]
    movq rcx, xmm0
    cmp rcx, rsi
    jne probe_wrong_bl
    pass {XSAVE}
probe_after_xsave:

    begin {CMPXCHG16B}
    bt dword ptr [r15 + FEATURES], 13
    jc probe_cmpxchg16b
    mov al, {CMPXCHG16B}
    out {PORT_NOT_OFFERED}, al
    jmp probe_after_cmpxchg16b
probe_cmpxchg16b:
    mov qword ptr [r15 + WIDE], 1
    mov qword ptr [r15 + WIDE + 8], 2
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg16b [r15 + WIDE]
    mov bl, {CMPXCHG16B}
    jnz probe_wrong_bl
    cmp qword ptr [r15 + WIDE], 3
    jne probe_wrong_bl
    cmp qword ptr [r15 + WIDE + 8], 4
    jne probe_wrong_bl
    pass {CMPXCHG16B}
probe_after_cmpxchg16b:

    // Into ring 3 by IRETQ; from there a SYSCALL (with SWAPGS) and back by SYSRET, and out by INT 0x80.
    begin {USER_MODE}
    mov ecx, MSR_STAR
    xor eax, eax
    mov edx, (USER_BASE << 16) | KERNEL_CODE
    wrmsr
    mov ecx, MSR_LSTAR
    lea rax, [rip + probe_on_syscall]
    xor edx, edx
    wrmsr
    mov ecx, MSR_SFMASK
    mov eax, 0x200                              // IF
    xor edx, edx
    wrmsr
    mov ecx, MSR_KERNEL_GS_BASE
    mov eax, r15d
    xor edx, edx
    wrmsr
    mov qword ptr [r15 + KERNEL_STACK], rsp
    push USER_DATA
    push {USER_STACK}
    push 2                                      // RFLAGS: interrupts off
    push USER_CODE
    lea rax, [rip + probe_user]
    push rax
    iretq
probe_back_in_kernel:
    mov bl, {USER_MODE}
    cmp qword ptr [r15 + USER_RING], 3
    jne probe_wrong_bl
    cmp qword ptr [r15 + SYSCALLS], 1
    jne probe_wrong_bl
    mov rax, qword ptr [r15 + MARK]
    cmp qword ptr [r15 + GS_VALUE], rax
    jne probe_wrong_bl
    pass {USER_MODE}

    // The local APIC's one-shot timer wakes the CPU from HLT.
    begin {APIC_TIMER}
    mov ebx, {APIC}
    mov dword ptr [rbx + 0xf0], 0x1ff           // software enable, spurious vector 0xff
    mov dword ptr [rbx + 0x80], 0               // task priority
    mov dword ptr [rbx + 0x350], 0x10000        // LINT0 masked: nothing from the 8259
    mov al, 0xff
    out 0x21, al                                // and the 8259s themselves
    out 0xa1, al
    mov dword ptr [rbx + 0x3e0], 0xb            // divide by 1
    mov dword ptr [rbx + 0x320], VECTOR_TIMER
    mov dword ptr [rbx + 0x380], 100000
    lea rdi, [r15 + TIMER_IRQS]
    call probe_wait
    pass {APIC_TIMER}

    begin {TSC_DEADLINE}
    bt dword ptr [r15 + FEATURES], 24
    jc probe_deadline
    mov al, {TSC_DEADLINE}
    out {PORT_NOT_OFFERED}, al
    jmp probe_after_deadline
probe_deadline:
    mov dword ptr [rbx + 0x320], 0x40000 | VECTOR_DEADLINE
    mfence
    rdtsc
    add eax, 100000
    adc edx, 0
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
    lea rdi, [r15 + DEADLINE_IRQS]
    call probe_wait
    pass {TSC_DEADLINE}
probe_after_deadline:

    // An interrupt raised by the host through an eventfd and the I/O APIC: the way of every virtio device.
    begin {IRQFD}
    mov esi, {IO_APIC}
    mov dword ptr [rsi], 0x11 + 2 * {GSI}       // destination: CPU 0
    mov dword ptr [rsi + 0x10], 0
    mov dword ptr [rsi], 0x10 + 2 * {GSI}       // fixed, edge, unmasked
    mov dword ptr [rsi + 0x10], VECTOR_LINE
    mov al, {IRQFD}
    out {PORT_RAISE}, al
    lea rdi, [r15 + LINE_IRQS]
    call probe_wait
    pass {IRQFD}

    mov al, 0
    out {PORT_DONE}, al
probe_stop:
    cli
    hlt
    jmp probe_stop

// The step whose number is in bl, or in al, gave a wrong result.
probe_wrong_bl:
    mov al, bl
probe_wrong:
    out {PORT_WRONG}, al
    jmp probe_stop

// Halts until the counter at rdi is not zero. STI takes effect after the next instruction, so no interrupt
// slips between the test and the HLT.
probe_wait:
    cmp qword ptr [rdi], 0
    jne probe_waited
    sti
    hlt
    cli
    jmp probe_wait
probe_waited:
    ret

// Gate edi of the IDT leads to rax; sil is its type. Changes rax and r8.
probe_set_gate:
    mov r8d, edi
    shl r8d, 4
    add r8d, {IDT}
    mov word ptr [r8], ax
    mov word ptr [r8 + 2], KERNEL_CODE
    mov byte ptr [r8 + 4], 0
    mov byte ptr [r8 + 5], sil
    shr rax, 16
    mov word ptr [r8 + 6], ax
    shr rax, 16
    mov dword ptr [r8 + 8], eax
    mov dword ptr [r8 + 12], 0
    ret

probe_user:
    mov eax, cs
    and eax, 3
    mov qword ptr [r15 + USER_RING], rax
    syscall
    int VECTOR_USER
    // The interrupt does not return here.
    ud2

probe_on_syscall:
    swapgs
    mov rax, qword ptr gs:[MARK]
    mov qword ptr [r15 + GS_VALUE], rax
    swapgs
    inc qword ptr [r15 + SYSCALLS]
    sysretq

probe_on_user_interrupt:
    mov rsp, qword ptr [r15 + KERNEL_STACK]
    jmp probe_back_in_kernel

probe_on_breakpoint:
    inc qword ptr [r15 + BREAKPOINTS]
    iretq

probe_on_invalid_opcode:
    inc qword ptr [r15 + INVALID_OPCODES]
    add qword ptr [rsp], 2                      // over the ud2
    iretq

probe_on_page_fault:
    push rax
    push rcx
    mov rax, cr2
    mov qword ptr [r15 + FAULT_ADDRESS], rax
    inc qword ptr [r15 + PAGE_FAULTS]
    mov ecx, {WINDOW_TABLE}
    mov dword ptr [rcx + 8], {PAGE_B} + 7
    pop rcx
    pop rax
    add rsp, 8                                  // the error code
    iretq

    .macro on_interrupt counter
    push rax
    inc qword ptr [r15 + \counter]
    mov eax, {APIC}
    mov dword ptr [rax + 0xb0], 0               // end of interrupt
    pop rax
    iretq
    .endm
probe_on_timer:
    on_interrupt TIMER_IRQS
probe_on_line:
    on_interrupt LINE_IRQS
probe_on_deadline:
    on_interrupt DEADLINE_IRQS

// Eight bytes for each of the vectors 0 to 31, and one for all above.
    .balign 8
probe_stubs:
    .set vector, 0
    .rept 33
    .balign 8
    push vector
    jmp probe_unexpected
    .set vector, vector + 1
    .endr
probe_unexpected:
    pop rax
    out {PORT_EXCEPTION}, al
    jmp probe_stop

    .balign 16
probe_gdt:
    .quad 0
    .quad 0x00209b0000000000                    // 0x08 kernel code, 64-bit
    .quad 0x00cf93000000ffff                    // 0x10 kernel data
    .quad 0                                     // 0x18 would be 32-bit user code
    .quad 0x00cff3000000ffff                    // 0x20 user data
    .quad 0x0020fb0000000000                    // 0x28 user code, 64-bit
    .quad 0x0000890000000067 | ({TSS} << 16)    // 0x30 task state, 104 bytes at TSS (below 64 KiB)
    .quad 0
bulkhead_probe_guest_end:
    .popsection
