"""Mounts over TLS: every way in which a mount connects, and every next daemon, by the real commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from lazymem.fs import mountinfo
from lazymem.pages import PAGE_SIZE
from tests.support import skips
from tests.support.certificates import OVER, Pki, options
from tests.support.mounts import Mounted, Server, Stage, command, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def serve(mounts: Stage, pki: Pki, *folders: Path, port: int = 0, allow: tuple[str, ...] = ("host-b",)) -> Server:
    rules = [word for rule in allow for word in ("--allow", rule)]
    return mounts.serve(*folders, port=port, arguments=(*options(pki.server()), *rules))


def kill_and_wait(mount: Mounted) -> None:
    """SIGKILL the daemon that serves now; returns when another one does."""
    before = mount.status()["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: mount.status()["pid"] != before, "another daemon answers")


def test_the_whole_way(mounts: Stage, pki: Pki, tmp_path: Path) -> None:
    """Daemon and filling process, demanded and guessed pages, a guest's writes; and the answers of one mount go through
    both connections while it touches."""
    big = make_snapshot(tmp_path / "big", pages=8192, seed=3)
    mount = mounts.mount(serve(mounts, pki, big.folder).address, *options(pki.client()))
    with mount.open_map() as ram:
        for number in range(0, 8192, 257):
            assert page_of(ram, number) == big.page(number)
        ram[5 * PAGE_SIZE : 5 * PAGE_SIZE + 5] = b"guest"
        ram.flush()
    wait_until(lambda: mount.status()["pages_held"] == 8192, "everything")
    expected = bytearray(big.ram)
    expected[5 * PAGE_SIZE : 5 * PAGE_SIZE + 5] = b"guest"
    assert mount.ram_path.read_bytes() == expected
    status = mount.status()
    assert status["pages_prefetched"] > 4000
    assert status["wire_received_bytes"] > len(big.ram) // 4
    assert "filling process" not in mount.log.read_text(), "it did its work, and ended for no other reason"
    mount.unmount()


@skips.needs_resend
def test_a_killed_and_an_upgraded_daemon(mounts: Stage, pki: Pki, snapshot: BuiltSnapshot) -> None:
    """Whoever comes next has the same certificate, and needs it: the pages are not here."""
    mount = mounts.mount(serve(mounts, pki, snapshot.folder).address, *options(pki.client()), *QUIET)
    with mount.open_map() as ram:
        assert page_of(ram, 3) == snapshot.page(3)
        kill_and_wait(mount)
        assert page_of(ram, 300) == snapshot.page(300)
        before = mount.status()["pid"]
        words = command("lazymem.cli.main", "mount", "--upgrade", mount.path)
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        assert mount.status()["pid"] != before
        assert page_of(ram, 600) == snapshot.page(600)
    assert mount.status()["survival"]["restarts"] == 2


def test_certificates_renewed_on_both_sides_while_the_server_is_away(
    mounts: Stage, pki: Pki, snapshot: BuiltSnapshot
) -> None:
    """And before that, one that expired: the mount waits, and says why, until somebody renews it."""
    server = serve(mounts, pki, snapshot.folder)
    mount = mounts.mount(server.address, *options(pki.client()), *QUIET)
    with mount.open_map() as ram:
        assert page_of(ram, 3) == snapshot.page(3)
        server.kill()
        pki.client(lifetime=OVER)
        serve(mounts, pki, snapshot.folder, port=server.port)
        wait_until(lambda: "our certificate has expired" in mount.status()["connection"], "it says why it waits")
        pki.client()
        assert page_of(ram, 300) == snapshot.page(300)
    assert "our certificate has expired" in mount.log.read_text()


def test_a_socket_that_is_always_full(mounts: Stage, pki: Pki, tmp_path: Path) -> None:
    """Behind a link slower than both ends: the kernel takes parts of records, and demands go between the guesses."""
    big = make_snapshot(tmp_path / "big", pages=2048, seed=5)
    server = serve(mounts, pki, big.folder)
    words = ["--target", server.address, "--rate", "8000000", "--round-trip", "0.004"]
    relay = subprocess.Popen(
        [sys.executable, "-m", "bench.relay", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert relay.stdout is not None
        address = f"127.0.0.1:{json.loads(relay.stdout.readline())['listening']}"
        mount = mounts.mount(address, *options(pki.client()))
        with mount.open_map() as ram:
            for number in range(2047, 0, -129):
                assert page_of(ram, number) == big.page(number)
        assert mount.ram_path.read_bytes() == big.ram
        assert mount.status()["reconnects"] == 0
    finally:
        relay.terminate()
        relay.communicate()


def test_a_unix_socket_beside_tls(mounts: Stage, pki: Pki, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Its mode says who may connect, and we are the server's own user: no certificate, and every name."""
    path = tmp_path / "s"
    rules = ("--allow", "host-b", "--listen", f"unix:{path}")
    mounts.serve(snapshot.folder, arguments=(*options(pki.server()), *rules))
    mount = mounts.mount(f"unix:{path}", *QUIET)
    with mount.open_map() as ram:
        assert page_of(ram, 3) == snapshot.page(3)


def test_a_mount_over_a_name_that_is_not_dialled(mounts: Stage, pki: Pki, snapshot: BuiltSnapshot) -> None:
    tls = structs.replace(pki.client(), name="ram.example")
    mount = mounts.mount(serve(mounts, pki, snapshot.folder).address, *options(tls), *QUIET)
    with mount.open_map() as ram:
        assert page_of(ram, 3) == snapshot.page(3)


def test_a_template_over_tls(mounts: Stage, pki: Pki, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    class Template(Mounted):
        MODULE = "lazymem.cli.template"

    server = serve(mounts, pki, snapshot.folder)
    made = Template(server.address, tmp_path / "mnt", *options(pki.client()), cache=tmp_path / "cache")
    try:
        assert made.ram_path.read_bytes() == snapshot.ram
    finally:
        made.clean_up()


def test_who_is_not_let_in_mounts_nothing(mounts: Stage, pki: Pki, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """In one line each, with the exit code of its kind."""
    other = make_snapshot(tmp_path / "other", pages=16)
    address = serve(mounts, pki, snapshot.folder, other.folder, allow=("snap=host-b", "other=host-c")).address
    stranger = Pki(tmp_path / "stranger").client(ca=pki.ca)
    tries = (
        (address, (), 10, "this server speaks TLS"),
        (address, options(stranger), 19, "does not know the authority of our certificate"),
        (f"{address}/other", options(pki.client()), 10, "there is no snapshot 'other' here for host-b"),
        (address, options(structs.replace(pki.client(), name="no.example")), 19, "for another name"),
        (address, options(pki.client())[:4], 2, "--tls-cert, --tls-key and --tls-ca"),
        (address, options(structs.replace(pki.client(), key=tmp_path / "none")), 2, "--tls-key"),
        ("unix:/none", options(pki.client()), 2, "TLS is for HOST:PORT"),
    )
    for number, (source, words, code, said) in enumerate(tries):
        mount = mounts.mount(source, *words, name=f"mnt{number}", check=False)
        assert mount.result.returncode == code, mount.result.stderr
        assert said in mount.result.stderr
        assert mount.result.stderr.count("\n") == 1
        assert mountinfo.maybe_mount_at(str(mount.path)) is None
    mount = mounts.mount(f"{address}/snap", *options(pki.client()), *QUIET)
    assert mount.status()["snapshot"] == "snap"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_without_tls_nobody_else_can_reach_the_server(snapshot: BuiltSnapshot, host: str) -> None:
    words = command("lazymem_server.app", snapshot.folder, "--listen", f"{host}:0")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "without TLS" in done.stderr
    assert "--insecure" in done.stderr
    assert done.stderr.count("\n") == 1


def test_insecure_is_a_word_that_has_to_be_said(snapshot: BuiltSnapshot) -> None:
    words = command("lazymem_server.app", snapshot.folder, "--listen", "0.0.0.0:0", "--insecure")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert "0.0.0.0:" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0


def test_a_systemd_socket_that_others_reach_is_refused_too(snapshot: BuiltSnapshot) -> None:
    """The unit's socket may have been widened without a thought of TLS."""
    program = (
        "import os, socket, sys; s = socket.create_server(('0.0.0.0', 0)); os.dup2(s.fileno(), 3); "
        "os.set_inheritable(3, True); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.executable, [sys.executable, '-m', 'lazymem_server.app', sys.argv[1]])"
    )
    words = [sys.executable, "-c", program, str(snapshot.folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "0.0.0.0 without TLS" in done.stderr


def test_allow_without_tls_means_nothing(snapshot: BuiltSnapshot) -> None:
    words = command("lazymem_server.app", snapshot.folder, "--allow", "host-b")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--allow needs --tls-cert" in done.stderr
