"""One target under atheris, with libFuzzer's own options: ``python -m tests.fuzz.child TARGET OPTIONS...``."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lazymem"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
