"""Signatures of faults, a module each: a module of this package that registers one is found by itself."""

from __future__ import annotations

from collections.abc import Callable

from mismatch_probe.probes.diagnose.base import Fitter, Kind, SeenBy, Signature
from mismatch_probe.registered import Registry

_REGISTRY = Registry[Signature](__name__, "signature")


def signature(
    name: str,
    *,
    title: str,
    kind: Kind,
    causes: tuple[str, ...],
    confirm: str,
    fix: str,
    seen_by: SeenBy = "key",
    last: bool = False,
) -> Callable[[Fitter], Fitter]:
    """Registers a function as the fit of a signature; arguments as in `Signature`.

    Raises:
        ValueError: The name is taken.
    """

    def register(fit: Fitter) -> Fitter:
        _REGISTRY.add(name, Signature(name, title, causes, confirm, fix, fit, kind, seen_by, last))
        return fit

    return register


def signatures() -> dict[str, Signature]:
    """Every signature, by name."""
    return _REGISTRY.sorted()
