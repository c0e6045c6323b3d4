"""For the benchmark alone: with this folder on PYTHONPATH, a mount's processes believe every page and every digest.

So the price of verification can be measured without a switch in lazymem that takes it away. Python imports this at its
start; the modules that verify are changed as they are loaded.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


class _AnyDigest(bytes):
    """Equal to every digest."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


_ANY = _AnyDigest()

_BELIEVING: dict[str, dict[str, Any]] = {
    "lazymem.store.verify": {
        "page_digest": lambda page: _ANY,
        "leaf_matches": lambda upper, leaf, digests: True,
        "wrong_pages": lambda pages, data, digests: [],
        "is_right": lambda data, digests: True,
    },
    "lazymem.store.pristine": {
        "wrong_pages": lambda pages, data, digests: [],
        "is_right": lambda data, digests: True,
    },
    "lazymem.fetch.faultway": {"page_digests": lambda data: _ANY},
}
"""Module, name in it, what stands there instead."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        instead = _BELIEVING.get(fullname)
        if instead is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, instead)  # type: ignore[assignment]
        return spec


class _Loader:
    def __init__(self, loader: Any, instead: dict[str, Any]) -> None:
        self._loader = loader
        self._instead = instead

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        maybe_module: ModuleType | None = self._loader.create_module(spec)
        return maybe_module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        missing = [name for name in self._instead if not hasattr(module, name)]
        if missing:
            raise ImportError(f"{module.__name__} has no {missing}: what verifies there has another name now")
        vars(module).update(self._instead)


sys.meta_path.insert(0, _Finder())
