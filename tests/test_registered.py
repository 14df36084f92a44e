"""Entries that modules of a package register."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mismatch_probe.registered import Registry

_PACKAGE = "from mismatch_probe.registered import Registry\nregistry = Registry(__name__, 'toy')\n"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    """Of a package with two modules."""
    folder = tmp_path / "toy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(_PACKAGE)
    for module, name, value in (("a", "second", 2), ("b", "first", 1)):
        (folder / f"{module}.py").write_text(f"from toy_package import registry\nregistry.add('{name}', {value})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        monkeypatch.delitem(sys.modules, name)
    import toy_package  # type: ignore[import-not-found]

    found: Registry[int] = toy_package.registry
    return found


def test_modules_are_imported_when_entries_are_asked_for(registry: Registry[int]) -> None:
    assert registry.known == {}
    assert list(registry.all().items()) == [("second", 2), ("first", 1)]
    assert list(registry.sorted().items()) == [("first", 1), ("second", 2)]


def test_a_name_is_taken_once(registry: Registry[int]) -> None:
    registry.all()
    with pytest.raises(ValueError, match="toy first is registered twice"):
        registry.add("first", 3)
    assert registry.all()["first"] == 1
