"""The save stream: a guest's device state and its ordinary memory, in QEMU's own file format."""
