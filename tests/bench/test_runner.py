"""The order of a run, and a smoke of the whole benchmark on a small image."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

import lazymem
from bench import cli
from bench.images import look_through, synthetic
from bench.lazymemways import UNVERIFIED
from bench.links import LINKS
from bench.measures import MEASURES
from bench.record import Case
from bench.runner import Plan, mixed
from bench.way import VARIANTS
from bench.ways import WAYS
from lazymem.pages import PAGE_SIZE
from tests.support.mounts import WAIT_SECONDS, wait_until
from tests.support.processtree import children_of, descendants_of, is_gone
from tests.support.skips import needs_resend


def test_every_case_names_what_there_is() -> None:
    for measure in MEASURES.values():
        assert measure.cases
        for link, way in measure.cases:
            assert link in LINKS
            assert way in WAYS
        for target in measure.targets:
            needed = {target.way, target.beside or target.way, target.beyond or target.way}
            assert {(target.link, way) for way in needed} <= set(measure.cases)


def test_a_plan_takes_only_what_was_chosen() -> None:
    cases = Plan(measures=("touch",), links=("loopback",), ways=("nbdfuse", "copy")).cases()
    assert cases == [Case("touch", "loopback", "nbdfuse")]
    assert len(Plan().cases()) == sum(len(measure.cases) for measure in MEASURES.values())


def test_ways_of_ours_have_variants_where_the_measure_has_the_way() -> None:
    chosen = Plan(measures=("memory",), ways=("lazymem+tls", "lazymem-none+unsupervised", "nbdfuse")).cases()
    assert chosen == [Case("memory", "loopback", "lazymem+tls")]
    all_ways = ["lazymem", "lazymem+tls", "lazymem+unsupervised", "lazymem+tls+unsupervised", "lazymem+unverified"]
    plan = Plan(measures=("fill",), links=("20ms",), ways=("lazymem", "nbdfuse"), variants=VARIANTS)
    assert [case.way for case in plan.cases()] == [*all_ways, "nbdfuse"]


def test_what_cannot_do_without_a_supervisor_is_not_asked_to() -> None:
    plan = Plan(measures=("clients", "handover"), links=("loopback", "1ms"), variants=VARIANTS)
    assert sorted(case.way for case in plan.cases()) == ["lazymem"] * 2 + ["lazymem+tls"] * 2 + ["postcopy"]


def test_rounds_mix_the_order_and_keep_what_is_compared_together() -> None:
    cases = Plan().cases()
    orders = [mixed(cases, number) for number in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for order in orders:
        assert sorted(order, key=repr) == sorted(cases, key=repr)
        groups = [(case.measure, case.link) for case in order]
        changes = sum(before != after for before, after in pairwise(groups))
        assert changes == len(set(groups)) - 1


def test_an_image_is_what_it_says(tmp_path: Path) -> None:
    image = synthetic(tmp_path, 8)
    facts = image.facts
    assert facts.pages == 8 << 20 >> 12
    assert facts.nonzero_pages == facts.pages // 2
    assert facts.distinct_pages < facts.nonzero_pages
    assert facts.zstd_bytes < facts.distinct_pages * PAGE_SIZE
    assert look_through(image.ram) == facts
    assert len(image.nonzero_numbers()) == facts.nonzero_pages
    assert synthetic(tmp_path, 8) == image  # kept


@pytest.mark.system
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own way only: the peers' packages are the benchmark's need, not the tests'."""
    options = ["--measure", "touch", "--measure", "start", "--way", "lazymem", "--way", "lazymem-none"]
    options += ["--link", "loopback", "--link", "1ms", "--rounds", "1", "--image-mib", "8", "--touches", "200"]
    code = cli.main([*options, "--no-plots", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["samples"]) == 4
    assert all(sample["figures"]["touches"] == 200 for sample in found["samples"])
    assert "| loopback TCP | lazymem, guessing off | wait p50 seconds |" in output
    assert (tmp_path / "out" / "results.md").read_text() in output


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_it_has_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "--measure", "touch", "--way", "lazymem-none", "--link", "loopback"]
    command += ["--image-mib", "8", "--touches", "200", "--rounds", "1000", "--no-plots"]
    command += ["--work", str(tmp_path / "work"), "--out", str(out)]
    with (
        tempfile.TemporaryDirectory(prefix="lazymem-") as places,  # short: sockets are in it
        subprocess.Popen(command, env={**os.environ, "TMPDIR": places}, stdout=subprocess.DEVNULL) as run,
    ):
        wait_until((out / "results.json").exists, "a first sample")
        wait_until(lambda: bool(children_of(run.pid)), "it starts the next one")
        started = descendants_of(run.pid)
        run.send_signal(number)
        assert run.wait(WAIT_SECONDS) == 130
        wait_until(lambda: all(map(is_gone, started)), "what it started to end")
        assert places not in Path("/proc/self/mountinfo").read_text()
        assert not os.listdir(places)
    assert "wait p50 seconds" in (out / "results.md").read_text()


@needs_resend
@pytest.mark.system
def test_what_protection_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All variants, each held to be what its name says by the way itself."""
    options = ["--measure", "ready", "--way", "lazymem", "--protection", "--link", "loopback", "--rounds", "1"]
    options += ["--image-mib", "8", "--no-plots", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert cli.main(options) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    (row,) = [line for line in output.splitlines() if line.startswith("| loopback TCP | ready | lazymem | ready s")]
    assert row.count("; x ") == 4
    assert "| loopback TCP | command to mount ready, TLS, no supervisor |" in output
    assert "| loopback TCP | command to mount ready, nothing verified |" not in output, "that reaches no goal"


ROOT = Path(lazymem.__file__).parent

_LOOK = "from lazymem.store import {}; print({}.is_right(bytes(4096), bytes(16)))"


@pytest.mark.parametrize("module", ["verify", "pristine"])
def test_only_with_its_own_folder_on_the_path_is_anything_believed(module: str) -> None:
    def look(**more: str) -> str:
        command = [sys.executable, "-c", _LOOK.format(module, module)]
        return subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True).stdout

    assert look() == "False\n"
    assert look(PYTHONPATH=str(UNVERIFIED)) == "True\n"


def test_what_verifies_is_known_to_the_way_that_does_not() -> None:
    """A module that begins to verify, and is not listed, would make verification look cheaper than it is."""
    names = {"page_digest", "page_digests", "wrong_pages", "is_right", "leaf_matches"}
    files = [path for room in ("fetch", "store", "fs") for path in (ROOT / room).glob("*.py")]
    verifying = {
        f"lazymem.{path.parent.name}.{path.stem}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}
    }
    unused = {"lazymem.store.cachecheck", "lazymem.store.localsource"}  # lazymem verify; a source without a wire
    text = (UNVERIFIED / "sitecustomize.py").read_text()
    assert verifying == {module for module in verifying if f'"{module}": {{' in text} | unused
