# pages: fills RAM with a pattern, and tells on command whether it is still there. Made to find a single wrong byte
# after its RAM has travelled.
#
# Commands, one a line on COM1; numbers are decimal, or hexadecimal with 0x before them:
#
#       fill SEED [COUNT [FIRST]]       fill COUNT pages (all) from number FIRST on (0)   filled COUNT
#       verify                          check every filled page, in pseudo-random order   verified COUNT bad BAD first_bad ADDRESS
#       rewrite N SEED                  give N different filled pages new contents;
#                                       SEED chooses them                                 rewrote N
#       status                                                                            status ticks T pages P filled COUNT
#                                                                                         seed S generation G
#       quit CODE                       end the machine through the debug-exit port
#
# `status` is one line. ADDRESS is that of the lowest wrong 8 bytes, or `none`. Anything else: `error REASON`. At start: `ready`.
# Every 100 timer ticks, whatever else it does: `tick N`. An answer is one line, never with a tick inside.
#
# Pages are numbered through all RAM from 2 MiB on (what the memory map of the boot parameters names as RAM, below
# 128 GiB), but for the start of it, where 4 bytes a page hold the page's generation: which rewrite it was last part of.
# The 8 bytes at `address + 8 * i` of a page are  key + i * STEP  (mod 2^64), where
# key = mix(mix(seed + generation * STEP) + address)  and mix is the finalizer of splitmix64 (Steele, Lea, Flood 2014).

        .set    TICKS_PER_LINE, 100
        .include "pc.inc"

        .set    FIRST_ADDRESS, 0x200000
        .set    END_ADDRESS, 128 << 30          # of the loader's identity map
        .set    MAX_PARTS, 8                    # pieces of RAM in the memory map; further ones are not used
        .set    LINE_BYTES, 128
        .set    MAX_NUMBERS, 3
        .set    E820_COUNT, 0x1e8
        .set    E820_TABLE, 0x2d0
        .set    STEP, 0x9e3779b97f4a7c15        # 2^64 / golden ratio, odd

        .section .text
start:
        lea     rsp, [rip + stack_top]
        cld
        mov     rbp, rsi
        call    pc_init
        call    find_ram
        lea     rsi, [rip + text_ready]
        call    put_string

main:
        cli
        call    take_line
        jc      1f
        sti
        hlt
        jmp     main
1:      sti
        call    run_command
        jmp     main

# ---- RAM ----

# Fills `parts` from the memory map of the boot parameters at rbp, and takes the generation table off the first one.
find_ram:
        movzx   ecx, byte ptr [rbp + E820_COUNT]
        lea     rsi, [rbp + E820_TABLE]
        lea     rdi, [rip + parts]
        xor     r8d, r8d                        # pages so far
        mov     r9d, MAX_PARTS
1:      test    ecx, ecx
        jz      3f
        test    r9d, r9d
        jz      3f
        cmp     dword ptr [rsi + 16], 1
        jne     2f
        mov     rax, [rsi]                      # start, rounded up and not below FIRST_ADDRESS
        mov     rdx, rax
        add     rdx, [rsi + 8]                  # end, rounded down and not above END_ADDRESS
        add     rax, 4095
        and     rax, -4096
        mov     rbx, FIRST_ADDRESS
        cmp     rax, rbx
        cmovb   rax, rbx
        mov     rbx, END_ADDRESS
        cmp     rdx, rbx
        cmova   rdx, rbx
        and     rdx, -4096
        sub     rdx, rax
        jbe     2f
        shr     rdx, 12
        mov     [rdi], rax
        mov     [rdi + 8], rdx
        add     r8, rdx
        add     rdi, 16
        dec     r9d
2:      add     rsi, 20
        dec     ecx
        jmp     1b
3:      mov     rax, [parts]
        mov     [generations], rax
        lea     rdx, [r8 * 4 + 4095]
        shr     rdx, 12                         # pages of the table
        sub     r8, rdx
        sub     [parts + 8], rdx
        shl     rdx, 12
        add     [parts], rdx
        mov     [pages], r8
        ret

# Address (rdi) of page number rdi. Changes rax.
page_address:
        lea     rax, [rip + parts]
1:      cmp     rdi, [rax + 8]
        jb      2f
        sub     rdi, [rax + 8]
        add     rax, 16
        jmp     1b
2:      shl     rdi, 12
        add     rdi, [rax]
        ret

# rax = mix(rax). Changes rdx.
mix:
        mov     rdx, rax
        shr     rdx, 30
        xor     rax, rdx
        mov     rdx, 0xbf58476d1ce4e5b9
        imul    rax, rdx
        mov     rdx, rax
        shr     rdx, 27
        xor     rax, rdx
        mov     rdx, 0x94d049bb133111eb
        imul    rax, rdx
        mov     rdx, rax
        shr     rdx, 31
        xor     rax, rdx
        ret

# rax = key, rbx = STEP, rdi = address, for page number r12. Changes rcx, rdx.
page_key:
        mov     rdi, r12
        call    page_address
        mov     rcx, [generations]
        mov     eax, [rcx + r12 * 4]
        mov     rbx, STEP
        imul    rax, rbx
        add     rax, [seed]
        call    mix
        add     rax, rdi
        jmp     mix

# Writes page number r12. Changes rax, rbx, rcx, rdx, rdi.
write_page:
        call    page_key
        mov     ecx, 4096 / 64
1:      .set    at, 0
        .rept   8
        mov     [rdi + at], rax
        add     rax, rbx
        .set    at, at + 8
        .endr
        add     rdi, 64
        dec     ecx
        jnz     1b
        ret

# Checks page number r12: rsi = 0 if it is right, else rdi = address of the first wrong 8 bytes. Changes rax, rbx, rcx, rdx.
# Right is the usual case, so differences are gathered without a branch and looked for only where there are some.
check_page:
        call    page_key
        push    rax
        push    rdi
        xor     esi, esi
        mov     ecx, 4096 / 64
1:      .set    at, 0
        .rept   8
        mov     rdx, [rdi + at]
        xor     rdx, rax
        or      rsi, rdx
        add     rax, rbx
        .set    at, at + 8
        .endr
        add     rdi, 64
        dec     ecx
        jnz     1b
        pop     rdi
        pop     rax
        test    rsi, rsi
        jz      3f
        mov     ecx, 4096 / 8                   # the page may have changed meanwhile: the loop has an end of its own
2:      cmp     [rdi], rax
        jne     3f
        add     rax, rbx
        add     rdi, 8
        dec     ecx
        jnz     2b
        sub     rdi, 8
3:      ret

# ---- an order that visits each of `filled` pages once ----

# Sets up `order_mask` and `order_shift`: the smallest power of two that holds `filled` numbers.
order_init:
        mov     rax, [filled]
        dec     rax
        mov     ecx, 0
        jz      1f
        bsr     rcx, rax
        inc     ecx
1:      mov     eax, 1
        shl     rax, cl
        dec     rax
        mov     [order_mask], rax
        shr     ecx, 1
        inc     ecx
        mov     [order_shift], cl
        ret

# rax = place number rax in the order, below 2^bits: odd multiplications and xor-shifts are one to one. It may be
# `filled` or more; the caller goes to the next one then. Changes rcx, rdx.
order_place:
        mov     cl, [order_shift]
        mov     rdx, 0xd1342543de82ef95
        imul    rax, rdx
        and     rax, [order_mask]
        mov     rdx, rax
        shr     rdx, cl
        xor     rax, rdx
        mov     rdx, 0xaf251af3b0f025b5
        imul    rax, rdx
        and     rax, [order_mask]
        mov     rdx, rax
        shr     rdx, cl
        xor     rax, rdx
        ret

# ---- commands ----

# Takes bytes from the ring; carry set when `line` holds a whole line, zero-ended. Interrupts must be off.
take_line:
        mov     ecx, [ring_tail]
        cmp     ecx, [ring_head]
        je      3f
        inc     dword ptr [ring_tail]
        and     ecx, RING_BYTES - 1
        mov     al, [ring + rcx]
        mov     ecx, [line_used]
        cmp     al, '\n'
        je      2f
        cmp     al, '\r'
        je      2f
        cmp     ecx, LINE_BYTES - 1
        jae     take_line                       # no command is that long; what is left of it is none
        mov     [line + rcx], al
        inc     dword ptr [line_used]
        jmp     take_line
2:      test    ecx, ecx
        jz      take_line                       # an empty line, or the second half of CR LF
        mov     byte ptr [line + rcx], 0
        mov     dword ptr [line_used], 0
        stc
        ret
3:      clc
        ret

# Finds the line's first word in `commands` and calls its routine, with the numbers behind the word parsed.
run_command:
        lea     rbx, [rip + commands]
1:      mov     rdi, [rbx]
        test    rdi, rdi
        jz      4f
        lea     rsi, [rip + line]
2:      mov     al, [rdi]
        test    al, al
        jz      3f
        cmp     al, [rsi]
        jne     5f
        inc     rdi
        inc     rsi
        jmp     2b
3:      cmp     byte ptr [rsi], ' '             # the word must end here, too
        ja      5f
        push    qword ptr [rbx + 8]
        call    parse_numbers
        jnc     6f
        add     rsp, 8
        lea     rsi, [rip + text_bad_number]
        jmp     answer_text
4:      lea     rsi, [rip + text_unknown]
        jmp     answer_text
5:      add     rbx, 16
        jmp     1b
6:      ret                                     # to the command's routine

# Numbers at rsi into `numbers`, their count into `number_count`. Carry set: not a number, or too many.
parse_numbers:
        mov     dword ptr [number_count], 0
1:      lodsb
        cmp     al, ' '
        je      1b
        test    al, al
        jz      8f                              # carry is clear
        cmp     dword ptr [number_count], MAX_NUMBERS
        jae     9f
        dec     rsi
        mov     r8d, 10
        cmp     word ptr [rsi], 0x7830          # "0x"
        jne     2f
        mov     r8d, 16
        add     rsi, 2
2:      xor     ebx, ebx
        xor     ecx, ecx                        # digits
3:      movzx   eax, byte ptr [rsi]
        cmp     al, ' '
        jbe     6f
        sub     al, '0'
        cmp     al, 9
        jbe     5f
        add     al, '0'
        or      al, 0x20
        sub     al, 'a' - 10
        cmp     al, 10
        jb      9f
5:      cmp     eax, r8d
        jae     9f
        imul    rbx, r8
        add     rbx, rax
        inc     ecx
        inc     rsi
        jmp     3b
6:      test    ecx, ecx
        jz      9f
        mov     ecx, [number_count]
        mov     [numbers + rcx * 8], rbx
        inc     dword ptr [number_count]
        jmp     1b
8:      ret
9:      stc
        ret

# Prints the zero-ended text at rsi as a line.
answer_text:
        cli
        call    put_string
        call    new_line
        sti
        ret

# Prints text at rsi and number rax as a line.
answer_number:
        cli
        push    rax
        call    put_string
        pop     rax
        call    put_decimal
        call    new_line
        sti
        ret

usage_error:
        lea     rsi, [rip + text_usage]
        jmp     answer_text

command_fill:
        cmp     dword ptr [number_count], 1
        jb      usage_error
        xor     r9d, r9d                        # first
        cmp     dword ptr [number_count], 3
        jb      1f
        mov     r9, [numbers + 16]
        cmp     r9, [pages]
        ja      4f
1:      mov     rax, [pages]
        sub     rax, r9                         # at most so many
        mov     r10, rax
        cmp     dword ptr [number_count], 2
        jb      2f
        mov     r10, [numbers + 8]
        cmp     r10, rax
        ja      4f
2:      test    r10, r10
        jz      4f
        mov     rax, [numbers]
        mov     [seed], rax
        mov     [first], r9
        mov     [filled], r10
        mov     dword ptr [generation], 0
        mov     rdi, [generations]
        lea     rdi, [rdi + r9 * 4]
        mov     rcx, r10
        xor     eax, eax
        rep     stosd
        mov     r12, r9
        lea     r13, [r9 + r10]
3:      call    write_page
        inc     r12
        cmp     r12, r13
        jb      3b
        mov     rax, [filled]
        lea     rsi, [rip + text_filled]
        jmp     answer_number
4:      lea     rsi, [rip + text_range]
        jmp     answer_text

# r12 walks through the order, r13 is its end, r14 the pages found bad, r15 the lowest wrong address.
command_verify:
        cmp     qword ptr [filled], 0
        je      nothing_filled
        call    order_init
        inc     qword ptr [verifications]
        mov     rax, [verifications]            # another order each time
        add     rax, [seed]
        call    mix
        mov     r13, rax
        mov     r10, [order_mask]
        xor     r14d, r14d
        mov     r15, -1
1:      mov     rax, r13
        call    order_place
        cmp     rax, [filled]
        jae     2f
        mov     r12, [first]
        add     r12, rax
        call    check_page
        test    rsi, rsi
        jz      2f
        inc     r14
        cmp     rdi, r15
        cmovb   r15, rdi
2:      inc     r13
        sub     r10, 1
        jnc     1b
        cli
        lea     rsi, [rip + text_verified]
        call    put_string
        mov     rax, [filled]
        call    put_decimal
        lea     rsi, [rip + text_bad]
        call    put_string
        mov     rax, r14
        call    put_decimal
        lea     rsi, [rip + text_first_bad]
        call    put_string
        lea     rsi, [rip + text_none]
        test    r14, r14
        jz      answer_text
        mov     rax, r15
        call    put_hex
        call    new_line
        sti
        ret
nothing_filled:
        lea     rsi, [rip + text_nothing]
        jmp     answer_text

# r14: pages still to do. Between a page's generation and its contents the machine may be saved: the resumed guest goes on
# from there, and takes no other command before it is done.
command_rewrite:
        cmp     dword ptr [number_count], 2
        jne     usage_error
        cmp     qword ptr [filled], 0
        je      nothing_filled
        call    order_init
        mov     rax, [numbers + 8]
        call    mix
        mov     r13, rax
        mov     r14, [numbers]
        cmp     r14, [filled]
        cmova   r14, [filled]
        mov     r15, r14
        inc     dword ptr [generation]
1:      test    r14, r14
        jz      3f
        mov     rax, r13
        inc     r13
        call    order_place
        cmp     rax, [filled]
        jae     1b
        mov     r12, [first]
        add     r12, rax
        mov     eax, [generation]
        mov     rcx, [generations]
        mov     [rcx + r12 * 4], eax
        call    write_page
        dec     r14
        jmp     1b
3:      mov     rax, r15
        lea     rsi, [rip + text_rewrote]
        jmp     answer_number

command_status:
        cli
        lea     rbx, [rip + status_texts]
1:      mov     rsi, [rbx]
        test    rsi, rsi
        jz      2f
        call    put_string
        mov     rax, [rbx + 8]
        mov     rax, [rax]
        call    put_decimal
        add     rbx, 16
        jmp     1b
2:      call    new_line
        sti
        ret

command_quit:
        cmp     dword ptr [number_count], 1
        jne     usage_error
        mov     al, [numbers]
        jmp     end_machine

        .section .rodata
        .balign 8
commands:       .quad   word_fill, command_fill
                .quad   word_verify, command_verify
                .quad   word_rewrite, command_rewrite
                .quad   word_status, command_status
                .quad   word_quit, command_quit
                .quad   0
status_texts:   .quad   text_status, ticks
                .quad   text_pages, pages
                .quad   text_status_filled, filled
                .quad   text_seed, seed
                .quad   text_generation, generation
                .quad   0
word_fill:      .asciz  "fill"
word_verify:    .asciz  "verify"
word_rewrite:   .asciz  "rewrite"
word_status:    .asciz  "status"
word_quit:      .asciz  "quit"
text_ready:     .asciz  "ready\n"
text_filled:    .asciz  "filled "
text_verified:  .asciz  "verified "
text_bad:       .asciz  " bad "
text_first_bad: .asciz  " first_bad "
text_none:      .asciz  "none"
text_rewrote:   .asciz  "rewrote "
text_status:    .asciz  "status ticks "
text_pages:     .asciz  " pages "
text_status_filled: .asciz " filled "
text_seed:      .asciz  " seed "
text_generation: .asciz " generation "
text_unknown:   .asciz  "error unknown command"
text_bad_number: .asciz "error not a number, or too many of them"
text_usage:     .asciz  "error wrong number of arguments"
text_range:     .asciz  "error no such pages"
text_nothing:   .asciz  "error nothing is filled"

        .section .bss
        .balign 16
parts:          .skip   MAX_PARTS * 16          # address, pages
pages:          .skip   8                       # in all parts
generations:    .skip   8                       # address of the table
seed:           .skip   8
first:          .skip   8
filled:         .skip   8
generation:     .skip   8
verifications:  .skip   8
order_mask:     .skip   8
order_shift:    .skip   8
numbers:        .skip   MAX_NUMBERS * 8
number_count:   .skip   4
line_used:      .skip   4
line:           .skip   LINE_BYTES
