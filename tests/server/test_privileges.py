"""`lazymem-serve --user`: root's files are served by somebody who is not root any more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lazymem.pages import PageRange
from tests.support.mounts import WAIT_SECONDS, command
from tests.support.mounts import Server as ServerProcess
from tests.support.privileges import root_may_become_nobody
from tests.support.snapshots import make_snapshot
from tests.support.wireclient import connected


def refusal(*arguments: object) -> str:
    done = subprocess.run(
        command("lazymem_server.app", *arguments, "--listen", "127.0.0.1:0"),
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


@pytest.mark.needs_root
async def test_root_is_given_up_when_all_is_open(tmp_path: Path) -> None:
    """The snapshot's folder is root's alone."""
    built = make_snapshot(tmp_path / "web", pages=64)
    os.chmod(tmp_path, 0o700)
    if not root_may_become_nobody():
        assert "cannot become him" in refusal(built.folder, "--user", "nobody")
        return
    server = ServerProcess(built.folder, arguments=("--user", "nobody"))
    try:
        status = status_of(server.pid)
        assert "0" not in status["Uid"].split() + status["Gid"].split() + status["Groups"].split()
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        async with connected(server.address) as client:
            assert await client.read(PageRange(0, 64)) == built.ram
    finally:
        server.stop()


def test_a_user_who_is_nobody_known_is_refused(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "web", pages=4).folder
    assert "there is no such user" in refusal(folder, "--user", "no-such-user-here")


@pytest.mark.needs_root
def test_a_folder_to_learn_into_must_be_the_users(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "web", pages=4).folder
    (tmp_path / "learned").mkdir(mode=0o700)
    if not root_may_become_nobody():
        return
    assert "nobody cannot write there" in refusal(folder, "--user", "nobody", "--learn", tmp_path / "learned")
