"""The budget of one MiB: a step each for what a fill cannot do without, of real leaves of an image."""

from __future__ import annotations

from pathlib import Path

from bench.images import synthetic
from bench.measures import MEASURES
from bench.record import Case
from bench.runner import Plan, run

STEPS = {"server": ("read", "zstd_fast", "zstd_thorough", "send"), "client": ("receive", "zstd_fast", "zstd_thorough")}
ENDS = ("client_verify_leaf", "client_verify_pages", "client_write")


def test_every_step_is_timed(tmp_path: Path) -> None:
    plan = Plan(measures=("stages",), rounds=1, image_mib=32)
    (sample,) = run(plan, tmp_path, lambda text: None)
    assert sample.case == Case("stages", *MEASURES["stages"].cases[0])
    assert sample.problem is None
    names = {f"{end}_{step}" for end, steps in STEPS.items() for step in steps} | set(ENDS)
    assert set(sample.figures) == {"leaves", *(f"{name}_seconds" for name in names)}
    assert all(value > 0 for value in sample.figures.values())
    assert sample.figures["leaves"] <= synthetic(tmp_path, 32).facts.nonzero_pages / 256
