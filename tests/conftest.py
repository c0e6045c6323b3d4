"""What holds for all tests."""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import skips
from tests.support.asroot import hand_over
from tests.support.privileges import maybe_as_own_root
from tests.support.vmprocess import Start, starting
from tests.support.watchdog import GRACE_SECONDS, Watchdog

WATCHDOG = pytest.StashKey[Watchdog]()

# How long one example takes says how busy the machine is, and nothing about the code: a test that is stuck meets
# pytest-timeout.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# A shell has Ctrl-C ignored by what it starts in the background, and children inherit that. Some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # when it is known which of them will run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0 and any(item.get_closest_marker("needs_root") for item in items):
        hand_over(items, maybe_as_own_root())


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WATCHDOG] = Watchdog()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[WATCHDOG].close()


@pytest.fixture(scope="session", autouse=True)
def _watched_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    request.config.stash[WATCHDOG].folder = tmp_path_factory.getbasetemp()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker is not None else item.config.getini("timeout") or 0)
    if not seconds:  # many tests, in a pytest of its own
        return (yield)
    with item.config.stash[WATCHDOG].over(item.nodeid, seconds + GRACE_SECONDS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skips.judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    skips.judge(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in skips.stand_ins(report for reports in terminalreporter.stats.values() for report in reports):
        terminalreporter.write_line(line)


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts lazymem-vms with as much RAM as the test's module says."""
    with starting(tmp_path, request.module.RAM_MIB) as begin:
        yield begin


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lazymem-") as folder:
        yield Path(folder)
