# Writes a screen of 1024 x 768 pixels, each of 4 bytes, over and over, 100 times a second or as often as it gets done.
# A static program for the Linux guest; its argument is the file that maps the framebuffer (sysfs, resource0).

        .intel_syntax noprefix
        .globl  _start
        .set    SCREEN_BYTES, 1024 * 768 * 4
        .set    STEP, 0x9e3779b97f4a7c15        # 2^64 / golden ratio: no two screens are alike, and none is zero

_start:
        mov     rdi, [rsp + 16]
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
screen: add     r12, r13
        mov     rdi, rbx
        mov     rax, r12
        mov     ecx, SCREEN_BYTES / 8
        rep stosq
        lea     rdi, [rip + pause]
        xor     esi, esi
        mov     eax, 35                         # nanosleep
        syscall
        jmp     screen
failed: mov     edi, 1
        mov     eax, 60                         # exit
        syscall

pause:  .quad   0, 10000000
