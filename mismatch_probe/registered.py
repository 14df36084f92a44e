"""What the modules of a package register under a name: to add one is to add a module."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, which modules of one package make when they are imported.

    Args:
        package: The package's `__name__`.
        what: What a name is of, for an error.

    Attributes:
        known: Those of the modules that have been imported.
    """

    def __init__(self, package: str, what: str) -> None:
        self._package, self._what = package, what
        self.known: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Registers an entry.

        Raises:
            ValueError: The name is taken.
        """
        if name in self.known:
            raise ValueError(f"{self._what} {name} is registered twice")
        self.known[name] = entry

    def all(self) -> dict[str, Entry]:
        """The entries of every module, in the order in which they were registered."""
        for module in pkgutil.iter_modules(sys.modules[self._package].__path__, f"{self._package}."):
            importlib.import_module(module.name)
        return dict(self.known)

    def sorted(self) -> dict[str, Entry]:
        """The entries of every module, by name."""
        return dict(sorted(self.all().items()))
