"""What is taken over from a manifest, which comes from another host: never an option that could name something here."""

from __future__ import annotations

import pytest

from lazymem.errors import IdentityError, UsageError
from lazymem.snapshot.manifest import Emulator
from lazymem.vm.qemurecorded import check_agrees, given, has, machine_type, missing, read, without


def made_by(*options: str, machine: str | None = "pc-q35-7.2", cpu: str | None = "qemu64") -> Emulator:
    return Emulator("qemu", "7.2.22", machine, cpu, options)


@pytest.mark.parametrize(
    ("recorded", "given"),
    [
        ("qemu64,+avx2", "qemu64,avx2=true"),
        ("qemu64,avx2=on", "qemu64,avx2=yes"),
        ("qemu64,-sse4.1", "qemu64,sse4_1=no"),
        ("qemu64,+pni,+nx", "qemu64,xd=y,sse3"),
        ("qemu64,ffxsr=off", "qemu64,fxsr_opt=false"),
    ],
)
def test_a_cpu_in_other_words_is_the_same(recorded: str, given: str) -> None:
    for its, his in ((recorded, given), (given, recorded)):
        found = read(made_by("-cpu", its))
        check_agrees(found, "pc-q35-7.2", ["-cpu", his])
        with pytest.raises(UsageError, match="fits no other"):
            check_agrees(found, "pc-q35-7.2", ["-cpu", f"{his},+ssse3"])


def test_an_ordinary_one() -> None:
    options = [
        "-nodefaults",
        "-accel",
        "tcg",
        "-machine",
        "q35,memory-backend=pc.ram,smm=off,mem-merge=off",
        "-m",
        "1G",
    ]
    options += ["-smp", "2,sockets=1", "-vga", "std", "-cpu", "Haswell,+vmx", "-global", "PIIX4_PM.disable_s3=1"]
    found = read(made_by(*options, "-device", "virtio-rng-pci", cpu="Haswell-v4"))
    assert found.machine == "pc-q35-7.2"
    assert found.switches == ("smm=off",)
    assert found.cpu == "Haswell-v4,+vmx"
    assert found.accelerator == "tcg"
    assert found.words == (*("-nodefaults", "-smp", "2,sockets=1", "-vga", "std", "-global", "PIIX4_PM.disable_s3=1"),)
    assert found.left_out == ("-device virtio-rng-pci",)


@pytest.mark.parametrize(
    "options",
    [
        ("-device", "loader,file=/etc/shadow"),
        ("-device", "vfio-pci,host=0000:01:00.0"),
        ("-global", "loader.file=/etc/shadow"),
        ("-global", "a.b=c,d=e"),
        ("-smp", "2;reboot"),
        ("-vga", "std\n-device\nx"),
        ("-icount", "shift=1,rr=record,rrfile=../x"),
        ("-rtc", "base=/x"),
        ("-machine", "pc,kernel=/etc/shadow,firmware=/x,dtb=x"),
        ("-machine", "pc,memory-encryption=sev0"),
        ("-chardev", "file,id=x,path=/etc/passwd"),
        ("-netdev", "tap,id=x,script=/tmp/x"),
        ("-cpu", "x,file=/etc"),
        ("-object", "y"),
        ("-nonsense",),
    ],
)
def test_what_could_name_something_here_is_not_repeated(options: tuple[str, ...]) -> None:
    found = read(made_by(*options))
    assert (found.words, found.switches) == ((), ())
    assert found.cpu in ("qemu64", None)


@pytest.mark.parametrize("machine", [None, "", "pc,kernel=x", "/pc", "-pc", "pc q35"])
def test_machines_that_are_none(machine: str | None) -> None:
    with pytest.raises(IdentityError, match="machine type"):
        read(made_by(machine=machine))


def test_a_snapshot_of_our_own_machine() -> None:
    with pytest.raises(IdentityError, match="made by lazymem-vm"):
        read(Emulator("lazymem-vm", "0.1", "lazymem-pc-0.1"))


@pytest.mark.parametrize(
    ("options", "accelerator"),
    [
        ((), None),
        (("-m", "1G"), "tcg"),
        (("-enable-kvm",), "kvm"),
        (("-accel", "kvm,kernel-irqchip=split"), "kvm"),
        (("-M", "pc,accel=kvm"), "kvm"),
        (("-machine", "pc,accel=kvm:tcg"), None),
        (("-accel", "/x"), None),
    ],
)
def test_accelerators(options: tuple[str, ...], accelerator: str | None) -> None:
    assert read(made_by(*options)).accelerator == accelerator


def test_the_users_options_have_to_agree() -> None:
    found = read(made_by("-smp", "2", "-cpu", "qemu64,+ssse3"))
    for cpu in ("qemu64,+ssse3", "qemu64,ssse3=on", "qemu64,+ssse3,ssse3=off", "qemu64,enforce,ssse3"):
        check_agrees(found, "pc-q35-7.2", ["-cpu", cpu, "-smp", "2"])
    check_agrees(found, None, [])
    cpus = ("max", "qemu64", "qemu64,-ssse3", "qemu64,-ssse3,+ssse3", "qemu64,+ssse3,+avx")
    others = [*(["-cpu", cpu] for cpu in cpus), ["-smp", "4"]]
    for machine, more in (("pc-q35-7.1", []), *((None, more) for more in others)):
        with pytest.raises(UsageError, match="the snapshot was made with"):
            check_agrees(found, machine, more)


def test_what_is_left_for_the_user_to_say() -> None:
    found = read(made_by("-device", "e1000", "-device", "virtio-rng-pci", "-m", "1G,slots=2,maxmem=2G"))
    assert missing(found, ["--device", "e1000", "-S"]) == ["-device virtio-rng-pci", "-m 1G,slots=2,maxmem=2G"]


def test_options_come_once_but_for_those_that_add_up() -> None:
    words = ["-nodefaults", "-smp", "2", "-global", "a.b=c"]
    assert without(words, ["-smp", "2", "-global", "d.e=f"]) == ["-nodefaults", "-global", "a.b=c"]


def test_a_generation_id_is_a_new_one_each_time() -> None:
    """Whatever the snapshot's was: whoever resumes it again gets another. The user's own word holds."""
    for told in ("vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", "vmgenid", "driver=vmgenid,guid=auto,id=x"):
        found = read(made_by("-device", told, "-device", "e1000"))
        assert found.words == ("-device", "vmgenid,guid=auto")
        assert found.left_out == ("-device e1000",)
        assert without(found.words, ["-device", "e1000"]) == ["-device", "vmgenid,guid=auto"]
        assert without(found.words, ["--device", "vmgenid,guid=none"]) == []
    assert read(made_by("-device", "vmgenid-like,file=/x")).words == ()


def test_reading_a_command_line() -> None:
    words = ["-machine", "pc", "-S", "-M", "q35", "--cpu", "max"]
    assert given(words, "-machine", "-M") == "q35"
    assert given(words, "-cpu") == "max"
    assert given(words, "-smp") is None
    assert has(words, "-S")
    assert not has(words, "pc", "max")
    assert [machine_type(value) for value in ("q35,accel=kvm", "type=pc", "accel=kvm")] == ["q35", "pc", None]
