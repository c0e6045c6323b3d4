"""For mounts and servers that a test starts with this folder in PYTHONPATH: see `tests.support.mountfaults`.

Python imports a module of this name at its start, before any other has taken the functions that are replaced.
"""

import os
import sys

if "LAZYMEM_TEST_FAULTS" in os.environ and {"lazymem.cli.mount", "lazymem_server.app"} & set(sys.orig_argv):
    from tests.support import mountfaults

    mountfaults.install(os.environ["LAZYMEM_TEST_FAULTS"], server="lazymem_server.app" in sys.orig_argv)
