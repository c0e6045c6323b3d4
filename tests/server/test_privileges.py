"""`lazymem-serve` is never root: what root alone may open is open before it becomes somebody else."""

from __future__ import annotations

import json
import os
import pwd
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from lazymem_server.privileges import ACCOUNTS, NOBODY, maybe_account

from lazymem.pages import PageRange
from lazymem.settings import TlsSettings
from lazymem.snapshot import workingset
from lazymem.snapshot.workingset import WorkingSet
from lazymem.tls.authority import Wanted
from lazymem.tls.contexts import make_context
from lazymem.tls.failures import Side
from lazymem.wire.messages import FileStored, PublishedFile, StoreFile
from tests.support import skips
from tests.support.certificates import Pki, options
from tests.support.mounts import WAIT_SECONDS, command, wait_until
from tests.support.mounts import Server as ServerProcess
from tests.support.privileges import root_may_become_nobody, user_namespaces
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import WireClient, connected, open_stream

needs_root = pytest.mark.needs_root


@pytest.fixture
def others() -> None:
    """That root can become somebody else."""
    if not root_may_become_nobody():
        skips.skip_without(skips.OTHERS, "nothing to become")


becomes = pytest.mark.usefixtures("others")


@pytest.fixture
def built(tmp_path: Path) -> BuiltSnapshot:
    """Root's alone."""
    os.chmod(tmp_path, 0o700)
    return make_snapshot(tmp_path / "web", pages=64)


def refusal(*arguments: object, before: Iterable[str] = ()) -> str:
    done = subprocess.run(
        [*before, *command("lazymem_server.app", *arguments, "--listen", "127.0.0.1:0")],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    return done.stderr


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def user_of(pid: int) -> int:
    return int(status_of(pid)["Uid"].split()[0])


def default_account() -> str:
    """Whom root becomes on this machine."""
    users = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ACCOUNTS if name in users), "nobody")


async def reads(address: str, built: BuiltSnapshot) -> None:
    async with connected(address) as client:
        assert await client.read(PageRange(0, 64)) == built.ram


def has_nothing(pid: int) -> None:
    """No id of root's, no capability, and no way to get any."""
    status = status_of(pid)
    assert "0" not in status["Uid"].split() + status["Gid"].split() + status["Groups"].split()
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"


@needs_root
@becomes
@pytest.mark.parametrize("asked", [("--user", "nobody"), ()])
async def test_root_is_given_up_when_all_is_open(built: BuiltSnapshot, tmp_path: Path, asked: tuple[str, ...]) -> None:
    server = ServerProcess(built.folder, arguments=asked, log=tmp_path / "log")
    try:
        has_nothing(server.pid)
        name = "nobody" if asked else default_account()
        assert f"lazymem-serve: serves as {name}, no longer as root\n" in (tmp_path / "log").read_text()
        await reads(server.address, built)
    finally:
        server.stop()


@pytest.fixture
def alone() -> list[str]:
    """What to put before a command so that it is a root who knows no other user: to the kernel he is us, but for his
    capabilities in there."""
    if not user_namespaces():
        skips.skip_without(skips.NAMESPACES, "no root of that kind")
    return ["unshare", "-r"]


def test_where_it_cannot_become_him_it_refuses_if_he_was_asked_for(built: BuiltSnapshot, alone: list[str]) -> None:
    assert "cannot become him" in refusal(built.folder, "--user", "nobody", before=alone)


async def test_where_it_can_become_nobody_else_it_has_no_capability(built: BuiltSnapshot, alone: list[str]) -> None:
    words = [*alone, *command("lazymem_server.app", built.folder, "--listen", "127.0.0.1:0")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        status = status_of(process.pid)
        assert {status[name].strip("0") for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {""}
        assert status["NoNewPrivs"] == "1"
        await reads(address, built)
    finally:
        process.kill()
        _, said = process.communicate()
    assert "serves without any capability" in said


def test_a_user_who_is_nobody_known_is_refused(built: BuiltSnapshot) -> None:
    assert "there is no such user" in refusal(built.folder, "--user", "no-such-user-here")


def test_root_by_name_is_refused(built: BuiltSnapshot) -> None:
    assert "never as root" in refusal(built.folder, "--user", "root")


def test_where_no_user_is_known_it_is_the_kernels_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image without a passwd file."""

    def unknown(_name: str) -> None:
        raise KeyError

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    found = maybe_account(None, None)
    assert found is not None
    assert (found.user, found.group, found.groups) == (NOBODY, NOBODY, ())


def test_who_is_not_root_stays_who_he_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert maybe_account(None, None) is None


# ---- what is written and read later


async def learn(address: str, built: BuiltSnapshot) -> None:
    data = workingset.encode(WorkingSet(built.identity, 64, (PageRange(3, 1),)))
    async with connected(address) as client:
        await store(client, data)


async def store(client: WireClient, data: bytes) -> None:
    request = StoreFile(client.next_id(), PublishedFile.WORKING_SET, 0, len(data), data)
    await client.send(request)
    [answer] = await client.answers(request.id)
    assert isinstance(answer, FileStored)


@needs_root
@becomes
async def test_what_is_learned_is_kept_in_a_folder_made_for_it(built: BuiltSnapshot, tmp_path: Path) -> None:
    """Below one that its account cannot even look into."""
    folder = tmp_path / "learned"
    server = ServerProcess(built.folder, arguments=("--learn", str(folder)))
    try:
        account = user_of(server.pid)
        assert account != 0
        await learn(server.address, built)
    finally:
        server.stop()
    [kept] = folder.iterdir()
    assert kept.stat().st_uid == folder.stat().st_uid == account


@needs_root
@becomes
async def test_the_owner_of_what_was_learned_is_who_it_becomes(built: BuiltSnapshot, tmp_path: Path) -> None:
    folder = tmp_path / "learned"
    folder.mkdir()
    os.chown(folder, 12345, 12346)
    server = ServerProcess(built.folder, arguments=("--learn", str(folder)))
    try:
        has_nothing(server.pid)
        assert user_of(server.pid) == 12345
        await learn(server.address, built)
    finally:
        server.stop()
    assert [kept.stat().st_uid for kept in folder.iterdir()] == [12345]


@needs_root
@becomes
async def test_roots_folder_of_learned_ones_is_read_and_no_more(built: BuiltSnapshot, tmp_path: Path) -> None:
    folder = tmp_path / "learned"
    folder.mkdir(mode=0o755)
    server = ServerProcess(built.folder, arguments=("--learn", str(folder)), log=tmp_path / "log")
    try:
        has_nothing(server.pid)
        await learn(server.address, built)
    finally:
        server.stop()
    assert not list(folder.iterdir())
    assert f"--learn {folder}: {default_account()} cannot write there" in (tmp_path / "log").read_text()
    assert "nobody cannot write there" in refusal(built.folder, "--user", "nobody", "--learn", folder)


def serial_shown(port: int, client: TlsSettings) -> str:
    """Of the certificate with which the server answers now."""
    context = make_context(client, Side.CLIENT)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        found = secured.getpeercert()
    assert found is not None
    return str(found["serialNumber"])


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that all may pass and read, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def put(path: Path, data: bytes) -> None:
    """As a whole, and for all to read."""
    draft = path.with_name("draft")
    draft.write_bytes(data)
    os.chmod(draft, 0o644)
    os.rename(draft, path)


@needs_root
@becomes
def test_a_renewed_certificate_of_roots_own_key_is_used(built: BuiltSnapshot, tmp_path: Path, public: Path) -> None:
    """The key is 0600 in a folder of root's, as administrators keep theirs; the certificate is for all to read."""
    pki = Pki(tmp_path / "pki")
    settings, client = pki.server(), pki.client()
    shown = TlsSettings(public / "server.crt", settings.key, public / "ca.crt")
    put(shown.cert, settings.cert.read_bytes())
    put(shown.ca, settings.ca.read_bytes())
    server = ServerProcess(built.folder, arguments=(*options(shown), "--allow", "host-b"), log=tmp_path / "log")
    try:
        has_nothing(server.pid)
        before = serial_shown(server.port, client)
        wanted = Wanted("ram.example", server=True, client=False, hosts=("127.0.0.1",))
        put(shown.cert, pki.renewed(settings, wanted))
        assert serial_shown(server.port, client) != before
    finally:
        server.stop()
    said = (tmp_path / "log").read_text()
    assert f"{settings.key}: {default_account()} cannot read it: another key takes a restart" in said
    assert said.count("takes a restart") == 1


# ---- the socket's end, and the server's


@needs_root
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_unix_socket_goes_with_its_server(built: BuiltSnapshot, tmp_path: Path, how: signal.Signals) -> None:
    """From a folder where its account may remove nothing; and what took its name meanwhile stays."""
    path, replaced = tmp_path / "s", tmp_path / "r"
    server = ServerProcess(built.folder, arguments=("--listen", f"unix:{path}", "--listen", f"unix:{replaced}"))
    try:
        assert path.is_socket()
        replaced.unlink()
        replaced.touch()
        os.kill(server.pid, how)
        wait_until(lambda: not path.exists(), "its socket is removed")
        assert replaced.is_file()
    finally:
        server.stop()


_ORPHAN = """
import ctypes, subprocess, sys
start = lambda: ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
server = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, preexec_fn=start)
print(server.pid, flush=True) if server.stdout.readline() else None
input()
"""


@needs_root
def test_it_ends_with_who_asked_for_that(built: BuiltSnapshot) -> None:
    """prctl(PR_SET_PDEATHSIG), which a change of user clears: lazymem-mount of a local folder ends its server so."""
    words = command("lazymem_server.app", built.folder, "--listen", "127.0.0.1:0")
    parent = subprocess.Popen([sys.executable, "-c", _ORPHAN, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        ended = os.pidfd_open(server)
    finally:
        parent.kill()
        parent.communicate()
    try:
        assert select.select([ended], [], [], WAIT_SECONDS)[0]
    finally:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        os.close(ended)


_ASKS = """
import os, socket
from lazymem_server.identity import user_identities
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
one, _other = socket.socketpair()
print(user_identities(one))
"""


@needs_root
@becomes
def test_who_it_became_is_not_its_own_user() -> None:
    """Over a Unix socket beside TLS: nobody may be many."""
    done = subprocess.run([sys.executable, "-c", _ASKS], capture_output=True, text=True, check=True)
    assert done.stdout == "('uid:65534',)\n"


# ---- what it may not be able to read later


@needs_root
@becomes
async def test_nothing_is_imported_once_root_is_given_up(built: BuiltSnapshot, tmp_path: Path, public: Path) -> None:
    """Its installation may be root's alone. `-X importtime` says each import, on the stderr that the log goes to."""
    pki = Pki(tmp_path / "pki")
    words = [sys.executable, "-X", "importtime", "-m", "lazymem_server.app", "--json", "--listen", "127.0.0.1:0"]
    words += ["--learn", str(tmp_path / "learned"), *options(pki.server()), "--allow", "host-b", str(built.folder)]
    words += ["--listen", f"unix:{tmp_path / 's'}"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=output, text=True)  # noqa: ASYNC220
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["listening"][0]
        serial_shown(int(address.rpartition(":")[2]), pki.client())
        await learn(f"unix:{tmp_path / 's'}", built)
        await reads(f"unix:{tmp_path / 's'}", built)
        await misbehave(address)
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
    before, became, after = log.read_text().partition("no longer as root\n")
    assert "import time:" in before
    assert became
    assert not re.findall("import time:.*", after)


async def misbehave(address: str) -> None:
    """What is refused is logged, too."""
    stream = await open_stream(address)
    await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
    while await stream.receive_some():
        pass
    await stream.aclose()
