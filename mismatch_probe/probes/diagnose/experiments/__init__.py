"""Experiments, a module each: a module of this package that registers one is found by itself.

An experiment makes columns of log-probs of the recorded ids, each under a hypothesis. One that explains a side is as
near to what it recorded as rounding allows, where the plain pass is not.
"""

from __future__ import annotations

from collections.abc import Callable

from mismatch_probe.probes.diagnose.experiments.base import Experiment, Run
from mismatch_probe.registered import Registry

_REGISTRY = Registry[Experiment](__name__, "experiment")


def experiment(
    name: str, *, classes: tuple[str, ...], forwards: int, needs: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Registers a function as an experiment; arguments as in `Experiment`.

    Raises:
        ValueError: The name is taken.
    """

    def register(run: Run) -> Run:
        _REGISTRY.add(name, Experiment(name, classes, forwards, needs, run))
        return run

    return register


def experiments() -> dict[str, Experiment]:
    """Every experiment, by name."""
    return _REGISTRY.sorted()
