"""The fork into the background: what the caller hears, what stays in the log, and what the daemon does not hold."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lazymem.errors import StoreError
from tests.support.mounts import WAIT_SECONDS, wait_until


def run(
    body: str, tmp_path: Path, *, pass_fds: tuple[int, ...] = (), before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `daemon(announcer)` with that body in the background, `before` before that; the log goes to `log`."""
    script = f"""
import logging, os, resource, sys
from pathlib import Path
from lazymem.cli.background import Announcer, run_in_background
from lazymem.errors import StoreError

folder = Path({str(tmp_path)!r})

def daemon(announcer: Announcer) -> int:
    logging.basicConfig(filename=folder / "log", level=logging.INFO)
{textwrap.indent(textwrap.dedent(body), "    ")}
    return 0

{before}
sys.exit(run_in_background("prog", daemon))
"""
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        pass_fds=pass_fds,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_an_error_at_the_start_is_one_line(tmp_path: Path) -> None:
    result = run("raise StoreError('the disk is gone')", tmp_path)
    assert (result.returncode, result.stderr) == (StoreError.exit_code, "prog: the disk is gone\n")


def test_a_bug_at_the_start_is_one_line_and_a_trace_in_the_log(tmp_path: Path) -> None:
    result = run("raise ValueError('two\\nlines')", tmp_path)
    assert result.returncode == 70
    assert result.stderr == "prog: a bug in lazymem (ValueError: two lines); run with -f to see where\n"
    assert "Traceback" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("error", ["StoreError('late')", "ValueError('late')"])
def test_what_ends_a_daemon_later_is_in_its_log(tmp_path: Path, error: str) -> None:
    """There was nothing at all: the caller had returned, and nobody else looked."""
    result = run(f"announcer.ready()\nraise {error}", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "late" in log.read_text(), "the daemon's last word")
    assert "the daemon ends" in log.read_text()


def test_nothing_of_the_callers_stays_open_in_the_daemon(tmp_path: Path) -> None:
    """As in a shell's `( flock 9; lazymem-mount ... ) 9>lock`: the lock would be held as long as the mount lives."""
    read_end, write_end = os.pipe()
    pipe = os.readlink(f"/proc/self/fd/{write_end}")
    try:
        result = run(
            "announcer.ready()\n"
            "found = ' '.join(os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd'))\n"
            "open(folder / 'fds', 'w').write(found)",
            tmp_path,
            pass_fds=(write_end,),
        )
        assert result.returncode == 0
        os.close(write_end)
        wait_until(lambda: (tmp_path / "fds").exists() and bool((tmp_path / "fds").read_text()), "the daemon's files")
        assert os.read(read_end, 1) == b""  # the end of the pipe: nobody has its other end
        assert pipe not in (tmp_path / "fds").read_text(), "its number may be taken, by nothing"
    finally:
        os.close(read_end)


def test_a_file_beyond_the_limit_of_open_files_is_let_go_of_too(tmp_path: Path) -> None:
    """As in `ulimit -n 64` in a shell that has more open: nothing can be put over such a number any more."""
    read_end, write_end = os.pipe()
    high = fcntl.fcntl(write_end, fcntl.F_DUPFD, 200)
    os.close(write_end)
    try:
        body = "announcer.ready()\n(folder / 'ran').touch()"
        result = run(body, tmp_path, pass_fds=(high,), before="resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
        assert (result.returncode, result.stderr) == (0, "")
        os.close(high)
        wait_until((tmp_path / "ran").exists, "the daemon")
        assert os.read(read_end, 1) == b"", "nobody has its other end"
    finally:
        os.close(read_end)


def test_a_caller_who_was_killed_ends_no_daemon(tmp_path: Path) -> None:
    body = """
    import signal, time
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.01)
    announcer.ready()
    (folder / "alive").touch()
    """
    assert run(body, tmp_path).returncode < 0
    wait_until((tmp_path / "alive").exists, "the daemon that nobody waited for")
