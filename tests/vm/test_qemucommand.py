"""lazymem-vm's options as QEMU's: the exact words, commas doubled, and what may not follow the --."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.errors import UsageError
from lazymem.vm.qemucommand import Wanted, check_more, command, pinning, with_control
from lazymem.vm.ram import MemFile

WANTED = Wanted(
    program=Path("/usr/bin/qemu"),
    ram=MemFile("pc.ram", Path("a,b")),
    ram_bytes=64 << 20,
    machine="pc-i440fx-7.2",
)


def test_the_whole_line() -> None:
    wanted = replace(
        WANTED,
        switches=("smm=off",),
        cpu="qemu64,+ssse3",
        accelerator="tcg",
        words=("-nodefaults", "-smp", "2"),
        kernel=Path("k"),
        append="quiet x=1,2",
        serial="file:c,d",
        qmp=Path("q,r"),
        incoming=True,
        start_paused=True,
        more=("-device", "virtio-rng-pci"),
    )
    assert command(wanted) == [
        *("/usr/bin/qemu", "-no-user-config", "-nodefaults", "-smp", "2", "-display", "none", "-accel", "tcg"),
        *("-machine", "pc-i440fx-7.2,smm=off,memory-backend=pc.ram,mem-merge=off,dump-guest-core=off", "-m", "64M"),
        *("-object", "memory-backend-file,id=pc.ram,size=67108864,mem-path=a,,b,share=on,prealloc=off"),
        *("-cpu", "qemu64,+ssse3", "-kernel", "k", "-append", "quiet x=1,2"),
        *("-chardev", "file,id=lazymem-serial,path=c,,d", "-serial", "chardev:lazymem-serial"),
        *("-qmp", "unix:q,,r,server=on,wait=off", "-incoming", "defer", "-S", "-device", "virtio-rng-pci"),
    ]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("none", ["-serial", "null"]),
        ("stdio", ["-serial", "stdio"]),
        ("unix:s,t", ["-serial", "unix:s,,t,server=on,wait=off"]),
    ],
)
def test_serial(where: str, words: list[str]) -> None:
    line = command(replace(WANTED, serial=where))
    assert line[line.index("-serial") :] == words


def test_serial_that_is_none() -> None:
    with pytest.raises(UsageError, match="-serial takes"):
        command(replace(WANTED, serial="pty"))


def test_the_users_serial_and_display_come_once() -> None:
    line = command(replace(WANTED, serial="stdio", more=("-serial", "mon:stdio", "--nographic")))
    assert line.count("-serial") == 1
    assert "-display" not in line
    assert line[-3:] == ["-serial", "mon:stdio", "--nographic"]


def test_a_private_map_and_a_file_that_is_only_read() -> None:
    private = replace(WANTED, ram=MemFile("pc.ram", Path("f"), share=False))
    memory = "memory-backend-file,id=pc.ram,size=67108864,mem-path=f,share=off,prealloc=off"
    assert memory in command(private)
    assert f"{memory},readonly=on,rom=off" in command(replace(private, unwritable=True))


def test_sizes_and_instruction_counting() -> None:
    line = command(replace(WANTED, ram_bytes=(1 << 20) + 8192, icount=True))
    assert line[line.index("-m") + 1] == "1032K"
    assert line[line.index("-icount") + 1] == "shift=0,sleep=off"


def test_our_own_monitor_comes_first() -> None:
    """So that no option of the user's takes a word of it for its value."""
    assert with_control(["qemu", "-x"], 5) == [
        *("qemu", "-chardev", "socket,id=lazymem-control,fd=5", "-mon", "chardev=lazymem-control,mode=control", "-x")
    ]


@pytest.mark.parametrize("word", ["-incoming", "--incoming", "-daemonize"])
def test_what_may_not_follow_the_dashes(word: str) -> None:
    with pytest.raises(UsageError, match="after the --"):
        check_more(["-device", "x", word, "defer"])
    check_more(["-name", "incoming", "-device", "daemonize"])


def test_what_pins_ram_is_found() -> None:
    assert pinning(["-device", "vfio-pci,host=01:00.0", "-overcommit", "mem-lock=on", "-mem-prealloc"]) == [
        "-mem-prealloc",
        "vfio-pci,host=01:00.0",
        "mem-lock=on",
    ]
    assert pinning(["-device", "virtio-net-pci"]) == []
