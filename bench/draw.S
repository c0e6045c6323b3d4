# Writes a screen of 1024 x 768 pixels, each of 4 bytes. A static program for the Linux guest; its arguments are the file
# that maps the framebuffer (sysfs, resource0), and what it draws, by its first letter:
#
#       plain    one value all over, another one each time  100 times a second, or as often as it gets done
#       noise    words of which no two are alike            the same
#       text     a console that scrolls by a line           the same
#       video    slopes of colour that move, with the       the same
#                noise of a camera in their lowest bits
#       once     noise                                      once, and ends
#
# What is drawn is the same each time that it is started.

        .intel_syntax noprefix
        .globl  _start
        .set    SCREEN_BYTES, 1024 * 768 * 4
        .set    STEP, 0x9e3779b97f4a7c15        # 2^64 / golden ratio: no two screens are alike, and none is zero
        .set    FACTOR, 0xa0761d6478bd642f      # wyhash's (Wang Yi, 2019): both halves of a product with it, as one
        .set    WIDTH, 1024
        .set    ROW_BYTES, WIDTH * 4
        .set    HEIGHT, 768
        .set    LINE_BYTES, 16 * ROW_BYTES      # of text: cells of 8 x 16 pixels
        .set    COLUMNS, WIDTH / 8
        .set    GLYPHS, 36
        .set    BACKGROUND, 0x00101820
        .set    NOISE_BITS, 0x00030303          # of a pixel: two of each colour

_start:
        mov     rdi, [rsp + 16]
        mov     rbp, [rsp + 24]
        movzx   ebp, byte ptr [rbp]
        mov     esi, 2                          # O_RDWR
        mov     eax, 2                          # open
        syscall
        test    rax, rax
        js      failed
        mov     r8, rax
        xor     edi, edi
        mov     esi, SCREEN_BYTES
        mov     edx, 3                          # PROT_READ | PROT_WRITE
        mov     r10d, 1                         # MAP_SHARED
        xor     r9d, r9d
        mov     eax, 9                          # mmap
        syscall
        test    rax, rax
        js      failed
        mov     rbx, rax
        movabs  r13, STEP
        movabs  r14, FACTOR
        cmp     ebp, 't'
        jne     screen
        mov     rdi, rbx
        mov     ecx, SCREEN_BYTES / 4
        mov     eax, BACKGROUND
        rep stosd
        mov     r15d, HEIGHT / 16               # a screen full of text before the first pause
full:   call    line
        dec     r15d
        jnz     full
screen: mov     rdi, rbx
        mov     ecx, SCREEN_BYTES / 8
        cmp     ebp, 't'
        je      text
        cmp     ebp, 'v'
        je      video
        cmp     ebp, 'p'
        jne     noise
        add     r12, r13
        mov     rax, r12
        rep stosq
        jmp     drawn
noise:  add     r12, r13
        mov     rax, r12
        mul     r14
        xor     rax, rdx
        stosq
        dec     ecx
        jnz     noise
        jmp     drawn
text:   call    line
        jmp     drawn
video:  call    frame
drawn:  cmp     ebp, 'o'
        je      done
        lea     rdi, [rip + pause]
        xor     esi, esi
        mov     eax, 35                         # nanosleep
        syscall
        jmp     screen
done:   xor     edi, edi
        mov     eax, 60                         # exit
        syscall
failed: mov     edi, 1
        mov     eax, 60
        syscall

random: add     r12, r13                        # in rax; rdx is lost
        mov     rax, r12
        mul     r14
        xor     rax, rdx
        xor     rax, r14                        # once alone has patterns that an eye sees
        mul     r13
        xor     rax, rdx
        ret

line:   mov     rdi, rbx                        # all lines go up by one, and the last is written
        lea     rsi, [rbx + LINE_BYTES]
        mov     ecx, (SCREEN_BYTES - LINE_BYTES) / 8
        rep movsq
        mov     rsi, rdi
        mov     ecx, LINE_BYTES / 4
        mov     eax, BACKGROUND
        rep stosd
        call    random
        mov     r8d, eax
        and     r8d, 3                          # which of the colours
        lea     rdi, [rip + colours]
        mov     r8d, [rdi + 4 * r8]
        shr     eax, 8
        and     eax, 63
        lea     r9d, [rax + COLUMNS - 80]       # so many characters
cell:   call    random
        mov     ecx, eax
        shr     eax, 8
        and     ecx, 7
        jz      next                            # one in eight is a space
        movzx   eax, ax
        imul    eax, eax, GLYPHS
        shr     eax, 16                         # which of them
        lea     edx, [8 * rax]
        sub     edx, eax
        lea     r10, [rip + glyphs]
        add     r10, rdx
        lea     rdi, [rsi + ROW_BYTES]
        mov     r11d, 14                        # each of 7 rows twice
row:    mov     edx, 14
        sub     edx, r11d
        shr     edx, 1
        movzx   edx, byte ptr [r10 + rdx]
        xor     ecx, ecx
pixel:  bt      edx, ecx
        jnc     unlit
        mov     [rdi + 4 * rcx], r8d
unlit:  inc     ecx
        cmp     ecx, 5
        jne     pixel
        add     rdi, ROW_BYTES
        dec     r11d
        jnz     row
next:   add     rsi, 32
        dec     r9d
        jnz     cell
        ret

frame:  inc     r15d                            # which; rdi is the screen
        xor     r8d, r8d                        # y
rows:   xor     r9d, r9d                        # x
pixels: lea     eax, [r9 + 2 * r9]              # red: 3x + 2y + 16 frames, over 8
        lea     eax, [rax + 2 * r8]
        mov     ecx, r15d
        shl     ecx, 4
        add     eax, ecx
        shr     eax, 3
        movzx   esi, al
        shl     esi, 16
        mov     eax, r9d                        # green: x^2 + y^2, over 4096, and as many as frames
        imul    eax, r9d
        mov     ecx, r8d
        imul    ecx, r8d
        add     eax, ecx
        shr     eax, 12
        add     eax, r15d
        movzx   eax, al
        shl     eax, 8
        or      esi, eax
        mov     eax, r9d                        # blue: xy, over 2048, and twice as many
        imul    eax, r8d
        shr     eax, 11
        lea     eax, [rax + 2 * r15]
        movzx   eax, al
        or      esi, eax
        call    random
        and     eax, NOISE_BITS
        and     esi, ~NOISE_BITS
        or      eax, esi
        stosd
        inc     r9d
        cmp     r9d, WIDTH
        jne     pixels
        inc     r8d
        cmp     r8d, HEIGHT
        jne     rows
        ret

pause:  .quad   0, 10000000

colours:
        .long   0x00c0c0c0, 0x00c0c0c0, 0x0060d060, 0x00e0c040

# Letters and digits of 5 x 7 pixels, a byte a row, the lowest bit to the left.
glyphs: .byte   0x0e, 0x11, 0x11, 0x1f, 0x11, 0x11, 0x11        # A
        .byte   0x0f, 0x11, 0x11, 0x0f, 0x11, 0x11, 0x0f        # B
        .byte   0x0e, 0x11, 0x01, 0x01, 0x01, 0x11, 0x0e        # C
        .byte   0x0f, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0f        # D
        .byte   0x1f, 0x01, 0x01, 0x0f, 0x01, 0x01, 0x1f        # E
        .byte   0x1f, 0x01, 0x01, 0x0f, 0x01, 0x01, 0x01        # F
        .byte   0x0e, 0x11, 0x01, 0x1d, 0x11, 0x11, 0x1e        # G
        .byte   0x11, 0x11, 0x11, 0x1f, 0x11, 0x11, 0x11        # H
        .byte   0x0e, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e        # I
        .byte   0x1c, 0x08, 0x08, 0x08, 0x08, 0x09, 0x06        # J
        .byte   0x11, 0x09, 0x05, 0x03, 0x05, 0x09, 0x11        # K
        .byte   0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x1f        # L
        .byte   0x11, 0x1b, 0x15, 0x15, 0x11, 0x11, 0x11        # M
        .byte   0x11, 0x11, 0x13, 0x15, 0x19, 0x11, 0x11        # N
        .byte   0x0e, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e        # O
        .byte   0x0f, 0x11, 0x11, 0x0f, 0x01, 0x01, 0x01        # P
        .byte   0x0e, 0x11, 0x11, 0x11, 0x15, 0x09, 0x16        # Q
        .byte   0x0f, 0x11, 0x11, 0x0f, 0x05, 0x09, 0x11        # R
        .byte   0x1e, 0x01, 0x01, 0x0e, 0x10, 0x10, 0x0f        # S
        .byte   0x1f, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04        # T
        .byte   0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e        # U
        .byte   0x11, 0x11, 0x11, 0x11, 0x11, 0x0a, 0x04        # V
        .byte   0x11, 0x11, 0x11, 0x15, 0x15, 0x15, 0x0a        # W
        .byte   0x11, 0x11, 0x0a, 0x04, 0x0a, 0x11, 0x11        # X
        .byte   0x11, 0x11, 0x11, 0x0a, 0x04, 0x04, 0x04        # Y
        .byte   0x1f, 0x10, 0x08, 0x04, 0x02, 0x01, 0x1f        # Z
        .byte   0x0e, 0x11, 0x19, 0x15, 0x13, 0x11, 0x0e        # 0
        .byte   0x04, 0x06, 0x04, 0x04, 0x04, 0x04, 0x0e        # 1
        .byte   0x0e, 0x11, 0x10, 0x08, 0x04, 0x02, 0x1f        # 2
        .byte   0x1f, 0x08, 0x04, 0x08, 0x10, 0x11, 0x0e        # 3
        .byte   0x08, 0x0c, 0x0a, 0x09, 0x1f, 0x08, 0x08        # 4
        .byte   0x1f, 0x01, 0x0f, 0x10, 0x10, 0x11, 0x0e        # 5
        .byte   0x0c, 0x02, 0x01, 0x0f, 0x11, 0x11, 0x0e        # 6
        .byte   0x1f, 0x10, 0x08, 0x04, 0x02, 0x02, 0x02        # 7
        .byte   0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e        # 8
        .byte   0x0e, 0x11, 0x11, 0x1e, 0x10, 0x08, 0x06        # 9
        .if     . - glyphs != GLYPHS * 7
        .error  "not so many glyphs"
        .endif
