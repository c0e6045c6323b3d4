"""A running guest handed over through TLS by the real commands; whoever may not take it hears so, and it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec import structs

from lazymem.settings import TlsSettings
from lazymem.vm.guests import build_guest
from tests.support.certificates import Pki, options
from tests.support.handover import Pair, pair
from tests.support.vmprocess import Process, Start, ticks_of, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_MIB = 8


@pytest.fixture
def guest(start: Start, tmp_path: Path) -> Process:
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    process = start("--pcram-file", ram, "-kernel", build_guest("heartbeat", tmp_path))
    process.wait_ticks(2)
    return process


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def with_tls(two: Pair, source: TlsSettings | None, destination: TlsSettings | None, allow: str = "host-b") -> None:
    if source is not None:
        two.send.arguments += [*options(source), "--allow", allow]
    if destination is not None:
        two.receive.arguments += options(destination)


@pytest.mark.parametrize(("step", "warm"), [("", 60.0), ("RECORDED given", 0.0)])
def test_a_guest_goes_on_elsewhere(guest: Process, pki: Pki, tmp_path: Path, step: str, warm: float) -> None:
    """Also with its pages ahead of it, and where the source is killed in the midst of it, and comes back."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there", warm=warm) as two:
        with_tls(two, pki.server(), pki.client())
        two.begin(source_dies=step)
        assert two.wait_settled() == (False, True)
        assert two.send.wait() == 0, two.tell()
        assert guest.end() == (0, "")
        assert two.report()["state"] == "released"
        # How many of them are used is for others to test: this guest has few, and may ask for them first.
        assert bool(two.report()["warmed_bytes"]) == bool(warm), two.tell()
        wait_until(lambda: bool(ticks_of(tmp_path / "there")), "the guest to count on")


def test_who_may_not_take_it_hears_so_and_the_next_one_takes_it(guest: Process, pki: Pki, tmp_path: Path) -> None:
    stranger = Pki(tmp_path / "stranger").client(ca=pki.ca)
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        with_tls(two, pki.server(), None)
        two.send.start()
        address = two.address()
        (tmp_path / "refused").mkdir()
        journal = ("--journal", tmp_path / "refused.journal")
        tries = (
            (options(pki.client("host-z")), 10, "host-z may not take this guest"),
            (options(stranger), 19, "does not know the authority of our certificate"),
            (options(structs.replace(pki.client(), name="no.example")), 19, "for another name"),
            ((), 10, "it speaks TLS: give lazymem receive --tls-cert"),
        )
        for words, code, said in tries:
            done = two.receive.run(arguments=(address, tmp_path / "refused", *journal, *words))
            assert (done.returncode, said in done.stderr) == (code, True), done.stderr
            assert done.stderr.count("\n") == 1
        with_tls(two, None, pki.client())
        two.receive.arguments += [address, str(two.mountpoint), *map(str, two.vm_options)]
        two.receive.start()
        assert two.wait_settled() == (False, True)
        assert two.send.wait() == 0, two.tell()
        assert guest.end() == (0, "")


def test_a_source_without_tls(guest: Process, pki: Pki, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor) as two:
        two.send.start()
        done = two.receive.run(arguments=(two.address(), two.mountpoint, *options(pki.client())))
        assert done.returncode == 19
        assert "does not speak TLS" in done.stderr
        for words, said in (
            (("--listen", "0.0.0.0:0"), "without TLS"),
            (("--allow", "host-b"), "--allow needs"),
            (options(pki.server()), "nobody may take the guest"),
            ((*options(pki.server()), "--allow", "web=host-b"), "no snapshot is called 'web'"),
        ):
            done = two.send.run(arguments=("--qmp", guest.monitor, "--journal", tmp_path / "none", *words))
            assert (done.returncode, said in done.stderr) == (2, True), done.stderr
            assert done.stderr.count("\n") == 1
