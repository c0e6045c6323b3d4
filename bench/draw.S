# Writes a screen of 1024 x 768 pixels, each of 4 bytes. A static program for the Linux guest; its arguments are the file
# that maps the framebuffer (sysfs, resource0), and what it draws, by its first letter:
#
#       plain   one value all over, another one each time   100 times a second, or as often as it gets done
#       noise   words of which no two are alike             the same
#       once    noise                                       once, and ends

        .intel_syntax noprefix
        .globl  _start
        .set    SCREEN_BYTES, 1024 * 768 * 4
        .set    STEP, 0x9e3779b97f4a7c15        # 2^64 / golden ratio: no two screens are alike, and none is zero
        .set    FACTOR, 0xa0761d6478bd642f      # wyhash's (Wang Yi, 2019): both halves of a product with it, as one

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
screen: mov     rdi, rbx
        mov     ecx, SCREEN_BYTES / 8
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

pause:  .quad   0, 10000000
