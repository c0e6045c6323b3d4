"""One target under atheris, with libFuzzer's own options: ``python -m tests.fuzz.child TARGET OPTIONS...``."""

from __future__ import annotations

import os
import sys

import atheris

with atheris.instrument_imports(include=["lazymem"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    command = os.environ.get("LAZYMEM_FUZZ_COMMAND", sys.argv[0])
    atheris.Setup([command, *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
