"""The table "The parent" of the design, row by row: what `-pcram-file` did, and that it is so here.

Each test is named by its row. What needs a running lazymem-vm is in test_cli_vm.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from lazymem.cli.vm_options import parse_command_line
from lazymem.errors import EnvironmentRefusedError, RamFileError
from lazymem.vm.migration import Migrations
from lazymem.vm.ram import Host, MemFile, RamBlock, RamBlocks, check_host, parse_mem_file, pc_ram_file, this_host
from lazymem.vm.runstate import RunState
from lazymem.vm.uri import FileUri
from tests.support.descriptors import open_descriptors
from tests.support.fakemachine import RAM_BYTES, SIZES, FakeMachine
from tests.support.streamreader import Stream, read_stream


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A file that fits pc.ram, with bytes in it."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(range(256)) * (RAM_BYTES // 256))
    return path


def refused_and_unchanged(path: Path, action: Callable[[], object]) -> str:
    """Runs `action`, which has to refuse and to leave the file as it was; the error's text."""
    before = (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
    with pytest.raises(RamFileError) as caught:
        action()
    after = (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
    assert after == before
    text = str(caught.value)
    assert "\n" not in text
    return text


async def save(machine: FakeMachine, target: Path) -> tuple[Migrations, Stream]:
    migrations = Migrations(RunState(machine), notice=lambda _: None)
    migrations.begin_save()
    await migrations.save(FileUri(target))
    assert migrations.progress is not None
    assert migrations.progress.status == "completed", migrations.progress.error
    return migrations, read_stream(await trio.Path(target).read_bytes())


class TestNamesBackingStorageForPcRam:
    """`--pcram-file FILE`; the single-dash spelling works too."""

    @pytest.mark.parametrize("option", ["-pcram-file", "--pcram-file"])
    def test_both_spellings(self, option: str) -> None:
        assert parse_command_line(["-m", "64", "-kernel", "k", option, "/x/y"]).mem_files == (
            MemFile("pc.ram", Path("/x/y")),
        )

    def test_guest_ram_is_the_file(self, ram: Path) -> None:
        with RamBlocks(SIZES, [pc_ram_file(str(ram))]) as blocks:
            assert blocks["pc.ram"].read(0x100, 3) == b"\x00\x01\x02"


class TestBlockAndPathPairs:
    """`--mem-file BLOCK=FILE` for any block; naming a block twice is refused with the block's name."""

    def test_any_block(self, tmp_path: Path) -> None:
        bios = tmp_path / "bios"
        bios.write_bytes(b"B" * dict(SIZES)["pc.bios"])
        with RamBlocks(SIZES, [parse_mem_file(f"pc.bios={bios}")]) as blocks:
            assert [block.name for block in blocks.values() if block.backed] == ["pc.bios"]
            assert blocks["pc.bios"].read(5, 2) == b"BB"

    def test_twice_is_refused(self, ram: Path) -> None:
        files = [pc_ram_file(str(ram)), parse_mem_file(f"pc.ram={ram}")]
        assert "pc.ram is named twice" in refused_and_unchanged(ram, lambda: RamBlocks(SIZES, files))

    def test_unknown_block_is_refused(self, ram: Path) -> None:
        text = refused_and_unchanged(ram, lambda: RamBlocks(SIZES, [MemFile("pc.rom", ram)]))
        assert "no RAM block pc.rom; this machine has pc.ram, pc.bios, vga.vram" in text

    @pytest.mark.parametrize("text", ["pc.ram", "=file", "pc.ram=", "pc.ram=f,share=maybe", "pc.ram=,share=on"])
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(RamFileError):
            parse_mem_file(text)

    def test_commas_belong_to_the_name(self) -> None:
        assert parse_mem_file("a=b,c,share=off") == MemFile("a", Path("b,c"), share=False)


class TestOnlyTheNamedBlockIsBacked:
    """All others are ordinary memory, and saved."""

    async def test_the_others_are_saved(self, ram: Path, tmp_path: Path) -> None:
        machine = FakeMachine([MemFile("pc.ram", ram)])
        machine.blocks["vga.vram"].write(4096, b"shown")
        _, stream = await save(machine, tmp_path / "vmstate")
        assert stream.memory("vga.vram")[4096:4101] == b"shown"
        assert stream.pages_of("vga.vram") == dict(SIZES)["vga.vram"] // 4096
        assert stream.pages_of("pc.bios") == dict(SIZES)["pc.bios"] // 4096
        machine.blocks.close()


class TestOpenStatSizeMap:
    """One clear error for each; nothing is changed."""

    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "none"
        text = refused_and_unchanged(path, lambda: RamBlocks(SIZES, [MemFile("pc.ram", path)]))
        assert text == f"cannot open {path} for RAM block pc.ram: No such file or directory"
        assert not path.exists()

    def test_unreadable(self, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", denied)  # The tests may run as root, whom no mode stops.
        with pytest.raises(RamFileError, match=r"cannot open .* for RAM block pc\.ram: Permission denied"):
            RamBlock("pc.ram", RAM_BYTES, mem_file=MemFile("pc.ram", ram))

    def test_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path, tmp_path / "fifo"):
            for share in (True, False):
                files = [MemFile("pc.ram", path, share)]
                assert "not a regular file" in refused_and_unchanged(path, lambda f=files: RamBlocks(SIZES, f))  # type: ignore[misc]

    def test_stat_fails(self, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(_: int) -> os.stat_result:
            raise OSError(errno.EIO, "Input/output error")

        def attempt() -> None:
            with monkeypatch.context() as patched:
                patched.setattr(os, "fstat", fails)
                RamBlocks(SIZES, [MemFile("pc.ram", ram)])

        text = refused_and_unchanged(ram, attempt)
        assert text == f"cannot stat {ram} for RAM block pc.ram: Input/output error"

    @pytest.mark.parametrize("size", [0, RAM_BYTES - 1, RAM_BYTES + 1, RAM_BYTES + 4096, 2 * RAM_BYTES])
    def test_wrong_size(self, ram: Path, size: int) -> None:
        os.truncate(ram, size)
        text = refused_and_unchanged(ram, lambda: RamBlocks(SIZES, [MemFile("pc.ram", ram)]))
        assert text == f"file {ram} has {size} bytes, but RAM block pc.ram needs exactly {RAM_BYTES}"

    def test_cannot_map(self, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object, **__: object) -> mmap.mmap:
            raise OSError(errno.ENODEV, "No such device")

        monkeypatch.setattr(mmap, "mmap", fails)
        text = refused_and_unchanged(ram, lambda: RamBlock("pc.ram", RAM_BYTES, mem_file=MemFile("pc.ram", ram)))
        assert "cannot map" in text
        assert "its file system has no shared writable maps" in text

    def test_an_error_gives_everything_back(self, ram: Path, tmp_path: Path) -> None:
        before = open_descriptors(collect=True)
        refused_and_unchanged(
            ram, lambda: RamBlocks(SIZES, [MemFile("pc.ram", ram), MemFile("vga.vram", tmp_path / "none")])
        )
        assert open_descriptors() == before
        RamBlocks(SIZES, [MemFile("pc.ram", ram)]).close()  # And the lock is gone.

    def test_the_map_is_shared(self, ram: Path) -> None:
        with RamBlocks(SIZES, [MemFile("pc.ram", ram)]) as blocks:
            blocks["pc.ram"].write(0x2000, b"written by the guest")
            assert ram.read_bytes()[0x2000:0x2014] == b"written by the guest"


class TestNoHostPointerBesides:
    def test_a_file_and_a_pointer_are_refused(self, ram: Path) -> None:
        with pytest.raises(ValueError, match="host pointer"):
            RamBlock("pc.ram", RAM_BYTES, mem_file=MemFile("pc.ram", ram), host=0x1000)

    def test_a_pointer_alone_is_ordinary_memory(self) -> None:
        with RamBlocks([("a", 4096)]) as memory:
            block = RamBlock("pc.ram", 4096, host=memory["a"].address)
            block.write(7, b"x")
            assert (memory["a"].read(7, 1), block.backed, block.do_not_save) == (b"x", False, False)


class TestDoNotSave:
    """Skipped when pages are sent and when the remaining ones are counted; still listed, and checked on loading."""

    async def test_listed_and_never_sent(self, ram: Path, tmp_path: Path) -> None:
        machine = FakeMachine([MemFile("pc.ram", ram)])
        migrations, stream = await save(machine, tmp_path / "vmstate")
        assert stream.blocks == dict(SIZES)
        assert stream.pages_of("pc.ram") == 0
        ordinary = sum(size for name, size in SIZES if name != "pc.ram")
        assert migrations.progress is not None
        assert (migrations.progress.total, migrations.progress.remaining) == (ordinary, 0)
        machine.blocks.close()

    async def test_an_unbacked_pc_ram_is_sent_and_counted(self, tmp_path: Path) -> None:
        machine = FakeMachine()
        migrations, stream = await save(machine, tmp_path / "vmstate")
        assert stream.pages_of("pc.ram") == RAM_BYTES // 4096
        assert migrations.progress is not None
        assert migrations.progress.total == sum(dict(SIZES).values())
        machine.blocks.close()

    async def test_the_last_block_may_be_the_backed_one(self, tmp_path: Path) -> None:
        """In the parent, walking past the last block ends the pass."""
        last, size = SIZES[-1]
        (tmp_path / "vram").write_bytes(b"v" * size)
        machine = FakeMachine([MemFile(last, tmp_path / "vram")])
        _, stream = await save(machine, tmp_path / "vmstate")
        assert (stream.pages_of(last), stream.pages_of("pc.bios")) == (0, dict(SIZES)["pc.bios"] // 4096)
        machine.blocks.close()

    async def test_all_blocks_may_be_backed(self, tmp_path: Path) -> None:
        files = []
        for name, size in SIZES:
            (tmp_path / name).write_bytes(bytes(size))
            files.append(MemFile(name, tmp_path / name))
        machine = FakeMachine(files)
        migrations, stream = await save(machine, tmp_path / "vmstate")
        assert (stream.page_records, list(stream.blocks)) == ([], [name for name, _ in SIZES])
        assert migrations.progress is not None
        assert migrations.progress.total == 0
        machine.blocks.close()


class TestHostsThatCannotFollow:
    """Refused with the reason."""

    def test_this_host_is_fine(self) -> None:
        check_host(this_host())

    @pytest.mark.parametrize(
        ("host", "reason"),
        [
            (Host("darwin", 4096, "little"), "needs Linux, this is darwin"),
            (Host("linux", 16384, "little"), "this host has 16384"),
            (Host("linux", 4096, "big"), "little-endian"),
        ],
    )
    def test_others_are_refused(self, host: Host, reason: str) -> None:
        with pytest.raises(EnvironmentRefusedError, match=reason):
            check_host(host)


class TestAllChangesAreInTheFile:
    """After a save the file is synced, and a second machine that maps a copy of it goes on from there."""

    async def test_synced_before_completed(self, ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine([MemFile("pc.ram", ram)])
        runstate = RunState(machine)
        migrations = Migrations(runstate, notice=lambda _: None)
        synced: list[tuple[str, str]] = []
        real_fsync = os.fsync

        def fsync(fd: int) -> None:
            assert migrations.progress is not None
            synced.append((os.readlink(f"/proc/self/fd/{fd}"), migrations.progress.status))
            real_fsync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        migrations.begin_save()
        await migrations.save(FileUri(tmp_path / "vmstate"))
        assert (str(ram), "active") in synced
        machine.blocks.close()

    async def test_one_save_may_leave_it_unsynced_and_the_next_does_not(
        self, ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A guest that is handed over stands meanwhile, and its RAM is served out of this host's memory. Whoever asked
        for it may have been killed since."""
        machine = FakeMachine([MemFile("pc.ram", ram)])
        migrations = Migrations(RunState(machine), notice=lambda _: None)
        synced: list[str] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
        migrations.leave_unsynced = True
        for times in (0, 2):
            migrations.begin_save()
            await migrations.save(FileUri(tmp_path / f"vmstate{times}"))
            assert synced.count(str(ram)) == times
        machine.blocks.close()

    async def test_most_of_it_while_the_guest_still_runs(
        self, ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In its pause only what it wrote since is left to be written out; what it writes last is in all the same."""
        machine = FakeMachine([MemFile("pc.ram", ram)])
        machine.on_stop = lambda: machine.blocks["pc.ram"].write(0, b"last word")
        machine.start()
        synced: list[tuple[str, bytes]] = []
        monkeypatch.setattr(
            machine.blocks, "sync", lambda: synced.append((machine.run_state, machine.blocks["pc.ram"].read(0, 9)))
        )
        await save(machine, tmp_path / "vmstate")
        assert synced == [("running", bytes(range(9))), ("paused", b"last word")]
        machine.blocks.close()

    async def test_storage_that_fails_stops_nobody(
        self, ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for failing in (1, 2):
            machine = FakeMachine([MemFile("pc.ram", ram)])
            machine.start()
            calls = itertools.count(1)

            def sync(failing: int = failing, calls: Iterator[int] = calls) -> None:
                if next(calls) == failing:
                    raise RamFileError("the disk is broken")

            monkeypatch.setattr(machine.blocks, "sync", sync)
            migrations = Migrations(RunState(machine), notice=lambda _: None)
            migrations.begin_save()
            await migrations.save(FileUri(tmp_path / "vmstate"))
            assert migrations.progress is not None
            assert migrations.progress.status == "failed"
            assert machine.run_state == "running"
            assert not await trio.Path(tmp_path / "vmstate").exists()
            machine.blocks.close()

    async def test_a_second_machine_goes_on_from_a_copy(self, ram: Path, tmp_path: Path) -> None:
        machine = FakeMachine([MemFile("pc.ram", ram)])
        machine.start()
        machine.blocks["pc.ram"].write(0x3000, b"where it was")
        machine.devices[0].values = {"mode": 7, "count": 99, "stamp": 1, "fifo": b"sixteen bytes..."}
        await save(machine, tmp_path / "vmstate")
        machine.blocks.close()
        copy = tmp_path / "copy"
        shutil.copyfile(ram, copy)

        second = FakeMachine([MemFile("pc.ram", copy)])
        runstate = RunState(second, incoming=True)
        migrations = Migrations(runstate, notice=lambda _: None)
        migrations.begin_take_over()
        await migrations.take_over(FileUri(tmp_path / "vmstate"))
        assert second.devices[0].values == machine.devices[0].values
        assert second.blocks["pc.ram"].read(0x3000, 12) == b"where it was"
        assert runstate.status == "running"
        second.blocks.close()


class TestPrivateMaps:
    """`share=off`: many guests run from one image and share its clean pages; no byte of it changes."""

    def test_option(self) -> None:
        assert pc_ram_file("f,share=off") == MemFile("pc.ram", Path("f"), share=False)

    def test_many_at_once_and_the_file_stays(self, ram: Path) -> None:
        image = ram.read_bytes()
        os.chmod(ram, 0o400)
        with (
            RamBlocks(SIZES, [MemFile("pc.ram", ram, share=False)]) as one,
            RamBlocks(SIZES, [MemFile("pc.ram", ram, share=False)]) as other,
        ):
            one["pc.ram"].write(0, b"mine")
            other["pc.ram"].write(2, b"its")
            assert one["pc.ram"].read(0, 6) == b"mine" + image[4:6]
            assert other["pc.ram"].read(0, 6) == image[:2] + b"its" + image[5:6]
            one.sync()
        assert ram.read_bytes() == image

    async def test_its_pages_are_saved_since_they_are_in_no_file(self, ram: Path, tmp_path: Path) -> None:
        machine = FakeMachine([MemFile("pc.ram", ram, share=False)])
        machine.blocks["pc.ram"].write(0, b"mine")
        _, stream = await save(machine, tmp_path / "vmstate")
        assert stream.memory("pc.ram") == b"mine" + (await trio.Path(ram).read_bytes())[4:]
        machine.blocks.close()


class TestOneFileForOneBlock:
    def test_two_blocks_cannot_share_a_file(self, ram: Path) -> None:
        """A lock that both want: the same error as for two guests."""
        sizes = [("pc.ram", RAM_BYTES), ("pc.rom", RAM_BYTES)]
        with pytest.raises(Exception, match="in use") as caught:
            RamBlocks(sizes, [MemFile("pc.ram", ram), MemFile("pc.rom", ram)])
        assert type(caught.value).__name__ == "BusyError"


async def test_trio_is_never_blocked_by_a_save(tmp_path: Path) -> None:
    """Another task gets its turn between any two parts of a save."""
    machine = FakeMachine()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await save(machine, tmp_path / "vmstate")
        nursery.cancel_scope.cancel()
    assert turns > len(SIZES)
    machine.blocks.close()
