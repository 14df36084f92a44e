"""The logits processors with made-up batches: what a GPU would show `RowsV2`, and what a CPU shows `RowsV1`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from mismatch_probe.engines.base import Capture
from mismatch_probe.engines.logits import row_weights, winner
from mismatch_probe.engines.rows import RowFile
from mismatch_probe.engines.vllm import processors
from mismatch_probe.engines.vllm.engine import VllmRollout
from mismatch_probe.engines.vllm.processors import NoiseV1, NoiseV2, RowsV1, RowsV2, request_arguments
from tests.real.rl_jobs import engine_job

pytestmark = pytest.mark.engine
VOCABULARY = 6


@pytest.fixture(autouse=True)
def no_writers() -> Iterator[None]:
    processors._writer.cache_clear()
    yield
    processors._writer.cache_clear()


def params(capture: Capture | None, sequence_id: int, prompt_length: int, forced: tuple[int, ...] = ()) -> Any:
    return SamplingParams(extra_args=request_arguments(sequence_id, prompt_length, 5, capture, forced))


def context(slots: list[int], seen: list[int]) -> Any:
    """The host's part of a `LogitsContext`: which slot each row is of, and how many tokens it sees."""
    return SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(seen))


def logits(*values: float) -> torch.Tensor:
    """A row per value, which its first entry shows."""
    rows = torch.zeros(len(values), VOCABULARY)
    rows[:, 0] = torch.tensor(values)
    return rows


def kept(path: Path) -> dict[tuple[int, int], float]:
    file = RowFile(path)
    found = {(k.sequence_id, k.position): float(file.row(k.slot)[0]) for k in file.kept}
    file.close()
    return found


def test_v2_rows_belong_to_the_slots_request_at_its_position(tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "rows"), 100)
    processor = RowsV2(None, None)
    assert processor.add_request(4, params(capture, 10, prompt_length=3))
    assert processor.add_request(0, params(capture, 11, prompt_length=5))
    assert not processor.add_request(2, SamplingParams())
    given = logits(0.1, 0.2, 0.3)
    assert processor.apply(given, context([4, 0, 2], [3, 5, 9])) is given
    processor.apply(logits(0.4, 0.5), context([0, 4], [6, 4]))  # the batch was reordered, and one request has ended
    assert kept(tmp_path / "rows") == pytest.approx({(10, 0): 0.1, (11, 0): 0.2, (11, 1): 0.4, (10, 1): 0.5})


def test_v2_the_rows_of_unfinished_prompts_are_nobodys(tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "rows"), 100)
    processor = RowsV2(None, None)
    processor.add_request(0, params(capture, 1, prompt_length=8))
    for seen, value in ((4, 0.1), (7, 0.2), (8, 0.3), (9, 0.4)):
        processor.apply(logits(value), context([0], [seen]))
    assert kept(tmp_path / "rows") == pytest.approx({(1, 0): 0.3, (1, 1): 0.4})


def test_v2_a_recycled_slot_forgets(tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "rows"), 100)
    processor = RowsV2(None, None)
    processor.add_request(3, params(capture, 1, prompt_length=2))
    processor.apply(logits(0.1), context([3], [2]))
    assert not processor.add_request(3, SamplingParams())
    processor.apply(logits(0.2), context([3], [2]))
    assert processor.add_request(3, params(capture, 2, prompt_length=2))
    processor.apply(logits(0.3), context([3], [2]))
    assert kept(tmp_path / "rows") == pytest.approx({(1, 0): 0.1, (2, 0): 0.3})


def test_v2_a_preempted_request_goes_on_where_it_was(tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "rows"), 100)
    processor = RowsV2(None, None)
    processor.add_request(0, params(capture, 1, prompt_length=2))
    processor.apply(logits(0.1), context([0], [2]))
    processor.apply(logits(0.2), context([0], [3]))
    processor.add_request(1, params(capture, 1, prompt_length=2))  # resumed in another slot, its tokens prefilled
    processor.apply(logits(0.3), context([1], [4]))
    assert kept(tmp_path / "rows") == pytest.approx({(1, 0): 0.1, (1, 1): 0.2, (1, 2): 0.3})


def test_v2_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_first_rank", lambda: False)
    processor = RowsV2(None, None)
    processor.add_request(0, params(Capture(str(tmp_path / "rows"), 100), 1, prompt_length=2))
    processor.apply(logits(0.1), context([0], [2]))
    assert not (tmp_path / "rows").exists()


def test_both_interfaces_keep_the_same_positions(tmp_path: Path) -> None:
    rows = {
        (s, t): torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(31 * s + t))
        for s in range(4)
        for t in range(9)
    }
    second = RowsV2(None, None)
    for s in range(4):
        second.add_request(s, params(Capture(str(tmp_path / "v2"), 12), s, prompt_length=3))
    for t in range(9):
        second.apply(torch.stack([rows[s, t] for s in range(4)]), context([0, 1, 2, 3], [3 + t] * 4))
    first, outputs = RowsV1(None, torch.device("cpu"), False), [[] for _ in range(4)]
    requests = [(s, params(Capture(str(tmp_path / "v1"), 12), s, prompt_length=3), [1], outputs[s]) for s in range(4)]
    first.update_state(BatchUpdate(batch_size=4, removed=[], added=requests, moved=[]))
    for t in range(9):
        first.apply(torch.stack([rows[s, t] for s in range(4)]))
        for output in outputs:
            output.append(0)
    assert kept(tmp_path / "v1") == kept(tmp_path / "v2")
    assert len(kept(tmp_path / "v1")) == 12


def noisy(scale: float, seed: int, prompt_length: int) -> Any:
    return SamplingParams(extra_args=request_arguments(0, prompt_length, seed, None, logit_noise=scale))


def test_both_interfaces_add_the_same_noise() -> None:
    second = NoiseV2(None, None)
    assert second.add_request(5, noisy(0.3, 7, prompt_length=4))
    assert second.add_request(2, noisy(0.3, 8, prompt_length=6))
    assert not second.add_request(0, SamplingParams())
    first, outputs = NoiseV1(None, torch.device("cpu"), False), [[], []]
    requests = [
        (i, noisy(0.3, seed, 1), [1], output) for i, (seed, output) in enumerate(zip((7, 8), outputs, strict=True))
    ]
    first.update_state(BatchUpdate(batch_size=2, removed=[], added=requests, moved=[]))
    for t in range(3):
        ours = second.apply(logits(0.1, 0.2, 0.3), context([2, 0, 5], [6 + t, 9 + t, 4 + t]))
        theirs = first.apply(logits(0.3, 0.1))
        assert torch.equal(ours[[2, 0]], theirs)
        assert torch.equal(ours[1], logits(0.2)[0])
        for output in outputs:
            output.append(0)


def test_v2_noise_has_its_size_and_is_fresh_at_each_position() -> None:
    processor = NoiseV2(None, None)
    processor.add_request(0, noisy(0.5, 7, prompt_length=3))
    seen = [processor.apply(torch.zeros(1, 20_000), context([0], [3 + t])) for t in range(2)]
    for values in seen:
        assert float(values.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float((seen[0] * seen[1]).mean())) < 0.01
    unfinished = processor.apply(torch.zeros(1, 20), context([0], [2]))
    assert not unfinished.any()


def test_v2_noise_forgets_a_recycled_slot() -> None:
    processor = NoiseV2(None, None)
    processor.add_request(3, noisy(0.5, 7, prompt_length=2))
    processor.add_request(3, SamplingParams())
    assert not processor.apply(torch.zeros(1, 20), context([3], [2])).any()


def racing(temperature: float, first: int, prompt_length: int) -> Any:
    arguments = request_arguments(0, prompt_length, 7, None, race_from=first)
    return SamplingParams(temperature=temperature, extra_args=arguments)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_both_interfaces_leave_the_winner_of_a_race(temperature: float) -> None:
    second, output = NoiseV2(None, None), []
    assert second.add_request(5, racing(temperature, 2, prompt_length=4))
    first = NoiseV1(None, torch.device("cpu"), False)
    wish = racing(temperature, 2, prompt_length=4)
    first.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, wish, [1], output)], moved=[]))
    rows = torch.randn(40, 1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for t, row in enumerate(rows):
        chosen = winner(row[0] / temperature, 7, 2 + t)
        for left in (second.apply(row.clone(), context([5], [4 + t])), first.apply(row.clone())):
            assert left.argmax() == chosen
            assert torch.isinf(left).sum() == VOCABULARY - 1
        output.append(int(chosen))
    untouched = second.apply(rows[0].clone(), context([5], [3]))  # a prompt that is not at its end
    assert torch.equal(untouched, rows[0])


def test_v1_forces_a_token_after_it_has_kept_the_row(tmp_path: Path) -> None:
    processor, output = RowsV1(None, torch.device("cpu"), False), []
    wish = params(Capture(str(tmp_path / "rows"), 9, {7: {1: (0.5, 3.0)}}), 7, prompt_length=3, forced=(4, 2))
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, wish, [1], output)], moved=[]))
    for wanted, value in ((4, 0.1), (2, 0.2)):
        changed = processor.apply(logits(value))[0]
        assert changed.argmax() == wanted
        assert torch.isinf(changed).sum() == VOCABULARY - 1
        output.append(wanted)
    after = processor.apply(logits(0.3))[0]
    assert torch.equal(after, logits(0.3)[0])  # nothing is forced beyond the given tokens
    assert kept(tmp_path / "rows") == pytest.approx({(7, 1): 0.2})


def test_a_request_that_wants_nothing_carries_nothing() -> None:
    assert request_arguments(1, 2, 3, None) is None
    assert RowsV1(None, torch.device("cpu"), False).new_req_logits_processor(SamplingParams()) is None


def test_a_row_with_nan_is_kept_like_the_least_sure_one() -> None:
    rows = torch.tensor([[0.0, float("nan"), 1.0], [50.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert row_weights(rows).tolist() == pytest.approx([1.0, 0.1, 2 / 3])


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("noise", [True, False])
def test_the_engine_gets_the_class_that_its_model_runner_takes(
    monkeypatch: pytest.MonkeyPatch, modern: bool, noise: bool
) -> None:
    config = SimpleNamespace(use_v2_model_runner=modern)
    asked: dict[str, Any] = {}
    # Through the dictionary: vLLM imports both only when they are asked for.
    arguments = SimpleNamespace(create_engine_config=lambda: config)
    monkeypatch.setitem(vars(vllm), "EngineArgs", lambda **_: arguments)
    monkeypatch.setitem(vars(vllm), "LLM", lambda **options: asked.update(options))
    job = replace(engine_job("a folder", "bfloat16"), logit_noise=noise, capture=None if noise else Capture("rows", 1))
    VllmRollout(job)
    name = f"{'Noise' if noise else 'Rows'}{'V2' if modern else 'V1'}"
    assert asked["logits_processors"] == [f"mismatch_probe.engines.vllm.processors:{name}"]
    assert hasattr(processors, name)
