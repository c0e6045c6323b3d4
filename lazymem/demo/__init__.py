"""The Linux guest of the demo and the system tests: its parts, and a QEMU that runs it."""
