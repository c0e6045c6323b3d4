# heartbeat: counts timer ticks (100 a second) and says so on the serial line, one line in ten ticks:
#
#       ready
#       tick 10
#       tick 20
#
# It halts between ticks. All it knows is in RAM and in the chips: resumed, it goes on counting where it was.

        .set    TICKS_PER_LINE, 10
        .include "pc.inc"

        .section .text
start:
        lea     rsp, [rip + stack_top]
        cld
        call    pc_init
        lea     rsi, [rip + text_ready]
        call    put_string
1:      sti
        hlt
        jmp     1b

        .section .rodata
text_ready:     .asciz  "ready\n"
