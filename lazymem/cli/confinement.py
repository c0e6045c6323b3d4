"""What root's daemon and its filling process may do, and no more. Who is not root has nothing to give up but that."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os

from lazymem.capabilities import Capability, keep_only, no_new_privileges
from lazymem.cli.landlock import shut_out_of_files
from lazymem.errors import EnvironmentRefusedError, LazymemError
from lazymem.settings import MountSettings, UnixEndpoint

log = logging.getLogger(__name__)

DAEMONS = frozenset(
    {
        Capability.SYS_ADMIN,  # mount, turn the kernel's knobs, and hear of its guest's page faults
        Capability.SYS_RESOURCE,  # never be throttled for dirt that only it can clean
        Capability.IPC_LOCK,  # lock its page maps
        Capability.SYS_NICE,
        Capability.SYS_PTRACE,  # see whose process holds the mount
        Capability.DAC_READ_SEARCH,
        Capability.DAC_OVERRIDE,  # read and write where an administrator points it
        Capability.SETUID,
        Capability.SETGID,
        Capability.SETPCAP,  # have its filling process give up more
    }
)
"""As in deploy/lazymem-mount@.service, which bounds a daemon that systemd starts (and SETPCAP, which only takes away).
Supervisor and next daemons inherit them."""


def bound_daemon() -> None:
    """Once, before there are threads and children."""
    if os.geteuid() == 0:  # to others, fusermount3 would no longer be root
        try:
            keep_only(DAEMONS)
        except OSError as error:
            log.warning("the daemon keeps all of root's capabilities: %s", error.strerror)


def confine_filler(settings: MountSettings) -> None:
    """Once, when all is open, and before there are threads: it takes bytes from a server apart, and needs no right for
    that. Its connections come and go, so what they need is got ready here.

    Raises:
        EnvironmentRefusedError: the kernel refuses.
    """
    codecs.lookup("idna")  # of each name; its module may lie where only root's rights can read it
    if settings.link.tls is not None:
        from lazymem.tls.contexts import client_context

        with contextlib.suppress(LazymemError):  # whoever connects says it; or reads it later, if he still may
            client_context(settings.link.tls)
    try:
        keep_only({Capability.DAC_OVERRIDE} if _is_somebody_elses(settings) else ())
        no_new_privileges()
    except OSError as error:
        raise EnvironmentRefusedError(f"it cannot give its capabilities up: {error.strerror}") from error
    shut_out_of_files()


def _is_somebody_elses(settings: MountSettings) -> bool:
    """Whether there is a Unix socket among the servers' that is not, or may not be, ours: its mode shuts out all but
    its owner, and those who may override that."""
    return any(
        isinstance(server.endpoint, UnixEndpoint) and not _is_own(server.endpoint.path) for server in settings.servers
    )


def _is_own(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()
    except OSError:  # not there yet
        return False
