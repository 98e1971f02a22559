"""Public names of a package, imported from their files when they are asked for; and its version."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def public_names(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package, from its public names by the module that defines them.

    Importing the package imports none of these, so that commands can describe themselves without torch. `__version__`
    is the installed distribution's.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("logit-cache")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted(modules), find
