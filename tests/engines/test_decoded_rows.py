"""Whose rows the steps of vLLM's model runners are, from runners made by hand: both kinds, caches and preemption."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mismatch_probe.engines.attribute.trace import Routers  # noqa: E402
from mismatch_probe.engines.attribute.variants import UNKNOWN  # noqa: E402
from mismatch_probe.engines.vllm import hooks  # noqa: E402

EXPERTS = 4


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Identity()


class _Model(torch.nn.Module):
    """Its routers' logits are what each step is given as states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([_Layer()])

    def forward(self, input_ids: Any, positions: Any, states: Any) -> Any:
        return self.layers[0].gate(states)


class _Runner:
    """A model runner of either kind."""

    def __init__(self, modern: bool) -> None:
        self.model, self.input_batch, self.query_start_loc = _Model(), SimpleNamespace(), SimpleNamespace()
        if modern:
            self.prepare_inputs = self._prepare  # found in the class of the real one

    def get_model(self) -> Any:
        return self.model

    def _prepare(self, names: list[str], starts: Any) -> Any:
        return SimpleNamespace(req_ids=names, query_start_loc_np=starts)

    def step(self, rows: Sequence[tuple[int, range, Sequence[int]]], padding: int = 0) -> None:
        """Requests with the positions that they compute, and the expert of each."""
        names = [f"7-{number}-a1b2" for number, _, _ in rows]
        starts = np.cumsum([0, *(len(places) for _, places, _ in rows)])
        if hasattr(self, "prepare_inputs"):
            self.prepare_inputs(names, np.array([*starts, 99]))
        else:
            self.input_batch.req_ids, self.query_start_loc.np = names, np.array([*starts, 0, 0])
        positions = [place for _, places, _ in rows for place in places] + [0] * padding
        experts = [expert for _, _, chosen in rows for expert in chosen] + [0] * padding
        logits = torch.nn.functional.one_hot(torch.tensor(experts), EXPERTS).float()
        self.model(input_ids=torch.zeros(len(positions)), positions=torch.tensor(positions), states=logits)


def _routes(runner: _Runner, steps: Sequence[Any], sequences: Sequence[Sequence[int]], padding: int = 0) -> list[int]:
    worker = SimpleNamespace(model_runner=runner)
    hooks.start_decoded_routes(worker, Routers(1, EXPERTS, 1))
    for step in steps:
        runner.step(step, padding)
    kept = hooks.finish_decoded_routes(worker, sequences)
    assert kept["layers"] == [0]
    runner.step([(0, range(1), [3])])  # the hooks are gone
    found = np.frombuffer(kept["routes"], np.int16).reshape(kept["shape"])
    assert found.shape == (1, sum(map(len, sequences)), 1)
    return [int(expert) for expert in found[0, :, 0]]


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_are_those_of_their_requests(modern: bool, padding: int) -> None:
    steps = [
        [(0, range(3), [0, 1, 2]), (1, range(2), [3, 2])],
        [(0, range(3, 4), [1]), (1, range(2, 3), [3])],
        # Another joins, and the order changes.
        [(2, range(2), [1, 1]), (1, range(3, 4), [0])],
        [(2, range(2, 3), [2])],
    ]
    found = _routes(_Runner(modern), steps, [[5, 6, 7, 8, 9], [4, 4, 4, 4, 4], [2, 2, 2, 2]], padding)
    assert found == [0, 1, 2, 1, UNKNOWN, 3, 2, 3, 0, UNKNOWN, 1, 1, 2, UNKNOWN]


def test_a_cached_beginning_has_the_rows_of_who_computed_it() -> None:
    steps = [
        [(0, range(3), [0, 1, 2]), (1, range(2, 3), [3]), (2, range(3), [3, 3, 1])],
        [(0, range(3, 4), [2]), (1, range(3, 4), [1]), (2, range(3, 4), [0])],
    ]
    found = _routes(_Runner(False), steps, [[5, 6, 7, 8, 1], [5, 6, 7, 9, 1], [4, 6, 7, 8, 1]])
    assert found == [0, 1, 2, 2, UNKNOWN, 0, 1, 3, 1, UNKNOWN, 3, 3, 1, 0, UNKNOWN]


def test_a_beginning_that_nobody_computed_is_unknown() -> None:
    steps = [[(0, range(3), [0, 1, 2]), (1, range(1, 3), [3, 1])]]
    assert _routes(_Runner(False), steps, [[5, 6, 7, 8], [4, 6, 7, 8]])[4:] == [UNKNOWN, 3, 1, UNKNOWN]


def test_what_a_preempted_request_computes_again_did_not_sample() -> None:
    steps = [[(0, range(2), [0, 1])], [(0, range(2, 3), [2])], [(0, range(4), [3, 3, 3, 3])]]
    assert _routes(_Runner(False), steps, [[5, 6, 7, 8, 9]]) == [0, 1, 2, 3, UNKNOWN]


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("layers", [1, 2], ids=["no-router-runs", "layers-not-found"])
def test_routers_that_cannot_be_seen_leave_nothing(modern: bool, layers: int) -> None:
    runner = _Runner(modern)
    worker = SimpleNamespace(model_runner=runner)
    hooks.start_decoded_routes(worker, Routers(layers, EXPERTS, 1))
    assert hooks.finish_decoded_routes(worker, [[5, 6]]) == {}
    assert "prepare_inputs" not in vars(runner)  # what was put over the class's own


def test_a_tie_for_the_last_place_is_unknown() -> None:
    runner, worker = _Runner(False), SimpleNamespace(model_runner=None)
    worker.model_runner = runner
    hooks.start_decoded_routes(worker, Routers(1, EXPERTS, 2))
    runner.step([(0, range(2), [0, 1])])  # one expert stands out, the three others tie
    kept = hooks.finish_decoded_routes(worker, [[5, 6]])
    assert set(np.frombuffer(kept["routes"], np.int16)) == {UNKNOWN}
