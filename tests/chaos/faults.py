"""The faults: what each does, to whom, and how it is over. A fault that cannot be had just now is left out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from lazymem.pages import PAGE_SIZE
from tests.chaos.world import BASE_DELAY_SECONDS, ServerPlace, Victim, World, children
from tests.support.badlink import Mode

Fault = Callable[[World, random.Random], bool]
"""Whether it was injected."""

SHORT_SECONDS = (0.05, 0.6)
LONG_SECONDS = (0.5, 3.0)
FLIP_SHARE = 0.25
"""Of what comes over a link while it flips bits, pieces of up to 64 KiB: some frames are broken, and most are not."""


def _last(rng: random.Random, bounds: tuple[float, float]) -> None:
    time.sleep(rng.uniform(*bounds))


# ---- servers


def server_killed(world: World, rng: random.Random) -> bool:
    place = rng.choice(world.places)
    place.kill()
    _last(rng, LONG_SECONDS)
    place.start()
    return True


def both_servers_killed(world: World, rng: random.Random) -> bool:
    for place in world.places:
        place.kill()
    _last(rng, LONG_SECONDS)
    for place in world.places:
        place.start()
    return True


def server_stopped(world: World, rng: random.Random) -> bool:
    pid = rng.choice(world.places).maybe_pid
    if pid is None:
        return False
    os.kill(pid, signal.SIGSTOP)
    _last(rng, LONG_SECONDS)
    os.kill(pid, signal.SIGCONT)
    return True


def certificates_renewed(world: World, rng: random.Random) -> bool:
    """Both sides', with other keys: those that are open stay, the next connections and daemons have the new ones."""
    if world.maybe_pki is None:
        return False
    world.maybe_pki.client("host-b")
    world.maybe_pki.server()
    return True


# ---- links


def _links(world: World, rng: random.Random) -> list[ServerPlace]:
    """One of them, or both."""
    return rng.sample(world.places, rng.choice([1, 1, 2]))


def links_cut(world: World, rng: random.Random) -> bool:
    for place in _links(world, rng):
        place.link.cut()
    return True


def links_reset(world: World, rng: random.Random) -> bool:
    for place in _links(world, rng):
        place.link.reset()
    return True


def links_half_open(world: World, rng: random.Random) -> bool:
    for place in _links(world, rng):
        place.link.forget()
    return True


def _mode(world: World, rng: random.Random, mode: Mode) -> bool:
    places = _links(world, rng)
    for place in places:
        place.link.mode = mode
    _last(rng, LONG_SECONDS)
    for place in places:
        place.link.mode = Mode.GOOD
    return True


def links_silent(world: World, rng: random.Random) -> bool:
    return _mode(world, rng, Mode.SILENT)


def links_trickle(world: World, rng: random.Random) -> bool:
    return _mode(world, rng, Mode.TRICKLE)


def links_refuse(world: World, rng: random.Random) -> bool:
    for place in world.places:
        place.link.reset()
    return _mode(world, rng, Mode.REFUSED)


def links_delay(world: World, rng: random.Random) -> bool:
    places = _links(world, rng)
    for place in places:
        place.link.delay_seconds = rng.uniform(0.03, 0.2)
    _last(rng, LONG_SECONDS)
    for place in places:
        place.link.delay_seconds = BASE_DELAY_SECONDS
    return True


def links_flip_bits(world: World, rng: random.Random) -> bool:
    for place in world.places:
        place.link.flip_share = FLIP_SHARE
    _last(rng, LONG_SECONDS)
    for place in world.places:
        place.link.flip_share = 0.0
    return True


# ---- processes of a mount


def _victim(world: World, rng: random.Random) -> Victim:
    return rng.choice(world.victims)


def daemon_killed(world: World, rng: random.Random) -> bool:
    victim = _victim(world, rng)
    pid = victim.maybe_daemon()
    if pid is None:
        return False
    victim.kill(pid, signal.SIGKILL)
    return True


def daemon_stopped(world: World, rng: random.Random) -> bool:
    pid = _victim(world, rng).maybe_daemon()
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        _last(rng, SHORT_SECONDS)
        os.kill(pid, signal.SIGCONT)
    return True


def supervisor_killed(world: World, rng: random.Random) -> bool:
    victim = _victim(world, rng)
    status = victim.maybe_status()
    if victim.maybe_daemon() is None or status is None:
        return False
    pid = victim.maybe_supervisor_of(status)
    if pid is None:
        return False
    victim.kill(pid, signal.SIGKILL)
    return True


def filler_killed(world: World, rng: random.Random) -> bool:
    """The process that brings what nobody asked for yet, where there is one."""
    victim = _victim(world, rng)
    status = victim.maybe_status()
    if status is None:
        return False
    found = [pid for pid in children(status["pid"]) if pid != status["survival"]["supervisor_pid"]]
    for pid in found:
        victim.kill(pid, signal.SIGKILL)
    return bool(found)


def next_daemon_killed(world: World, rng: random.Random) -> bool:
    """The one that is loaded, or loads, beside the present one."""
    victim = _victim(world, rng)
    status = victim.maybe_status()
    supervisor = victim.maybe_supervisor_of(status) if status is not None else None
    if status is None or supervisor is None:
        return False
    found = {pid for pid in (*children(supervisor), status["survival"]["next_pid"]) if pid not in (None, status["pid"])}
    for pid in found:
        victim.kill(pid, signal.SIGKILL)
    return bool(found)


def upgraded(world: World, rng: random.Random) -> bool:
    victim = _victim(world, rng)
    if victim.maybe_daemon() is None:
        return False
    command = [sys.executable, "-m", "lazymem.cli.main", "mount", "--upgrade", str(victim.mounted.path)]
    with suppress(subprocess.TimeoutExpired):  # it was refused, or overtaken by another fault
        subprocess.run(command, capture_output=True, check=False, timeout=10)
    return True


# ---- the cache folder


def cache_damaged(world: World, rng: random.Random) -> bool:
    """Bytes of fetched pages change on the disk; of written pages there is no second copy, so those are left alone."""
    found = [path for path in world.stage.cache.glob("*/pages") if not path.parent.name.startswith(("run-", "."))]
    if not found:
        return False
    path = rng.choice(sorted(found))
    with path.open("r+b") as file:
        pages = os.fstat(file.fileno()).st_size // PAGE_SIZE
        for _ in range(20):
            at = rng.randrange(pages) * PAGE_SIZE + rng.randrange(PAGE_SIZE)
            file.seek(at)
            byte = file.read(1)
            if byte and byte != b"\0":  # a hole stays one
                file.seek(at)
                file.write(bytes([byte[0] ^ 0x40]))
    return True


Faults = dict[str, tuple[int, Fault]]
"""Name to weight and what to do."""

OUTSIDE: Faults = {
    "server killed and started again": (3, server_killed),
    "both servers killed and started again": (2, both_servers_killed),
    "server stopped for a while": (2, server_stopped),
    "certificates renewed": (2, certificates_renewed),
    "links cut": (3, links_cut),
    "links reset": (3, links_reset),
    "links half-open": (1, links_half_open),
    "links silent for a while": (2, links_silent),
    "links trickling for a while": (1, links_trickle),
    "connections refused for a while": (2, links_refuse),
    "links slow for a while": (2, links_delay),
    "bits flipped on the links for a while": (4, links_flip_bits),
}

INSIDE: Faults = {
    "daemon killed": (6, daemon_killed),
    "daemon stopped for a while": (2, daemon_stopped),
    "supervisor killed": (4, supervisor_killed),
    "filling process killed": (2, filler_killed),
    "next daemon killed": (2, next_daemon_killed),
    "daemon upgraded": (2, upgraded),
    "bytes changed in the cache folder": (3, cache_damaged),
}
"""On the mounts' own host. One at a time: a daemon and its supervisor that are killed at once are the mount's end."""


def choose(faults: Faults, rng: random.Random) -> str:
    names = list(faults)
    return rng.choices(names, [faults[name][0] for name in names])[0]
