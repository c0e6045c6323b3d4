"""`python -m bench`."""

from __future__ import annotations

import signal
import sys

from bench.cli import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a measurement started ends with it
sys.exit(main())
