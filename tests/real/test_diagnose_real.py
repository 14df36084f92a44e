"""`diagnose --model` on a tiny model: dumps with a known fault, from the file to the cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mismatch_probe
from mismatch_probe.results.diagnosis import Diagnosis
from tests.real.tiny import VOCABULARY

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
Logits = Callable[[Any, list[int]], torch.Tensor]
Change = Callable[[torch.Tensor, list[int], int], torch.Tensor]


def _model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _altered(path: Path) -> Any:
    """The model with noise of a tenth on every weight."""
    model, draw = _model(path), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(0.1 * p.std() * torch.randn(p.shape, generator=draw))
    return model


@torch.no_grad()
def _column(model: Any, ids: list[int], start: int, change: Change | None = None) -> list[float]:
    """Log-probs of `ids` from `start` on by the whole forward pass, with the logits changed."""
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    if change is not None:
        logits = change(logits, ids, start)
    found = logits.log_softmax(-1)[torch.arange(len(ids) - start), torch.tensor(ids[start:])]
    return [float(x) for x in found]


@torch.no_grad()
def _sampled(model: Any, draw: np.random.Generator, n: int = 24, tokens: int = 24) -> list[tuple[list[int], int]]:
    """Ids that the model draws at temperature 1, and where each response begins."""
    found = []
    for _ in range(n):
        ids = draw.integers(4, VOCABULARY, int(draw.integers(4, 12))).tolist()
        start = len(ids)
        for _ in range(tokens):
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
            ids.append(int(draw.choice(VOCABULARY, p=p / p.sum())))
        found.append((ids, start))
    return found


def _penalty(logits: torch.Tensor, ids: list[int], start: int) -> torch.Tensor:
    for t in range(len(logits)):
        seen = torch.tensor(sorted(set(ids[: start + t])))
        x = logits[t, seen]
        logits[t, seen] = torch.where(x > 0, x / 1.3, x * 1.3)
    return logits


def _noise(values: list[float], draw: np.random.Generator) -> list[float]:
    """As rounding of logits would move log-probs: less where the token is certain."""
    return [x + 0.01 * float(draw.standard_normal()) * -np.expm1(x) for x in values]


@pytest.fixture(scope="module")
def drawn(tiny: Tiny) -> tuple[Path, Any, list[tuple[list[int], int]]]:
    path = tiny("llama")
    model = _model(path)
    return path, model, _sampled(model, np.random.default_rng(0))


def _diagnosed(folder: Path, rows: list[dict[str, Any]], model: Path, **more: Any) -> Diagnosis:
    dump = folder / "dump.jsonl"
    dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return mismatch_probe.diagnose(dump, model=model, **more)


def _rows(model: Any, sequences: list[tuple[list[int], int]], a: Any = None, b: Any = None) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    rows = []
    for ids, start in sequences:
        plain = _column(model, ids, start)
        columns = [_noise(plain if other is None else other(ids, start), draw) for other in (b, a)]
        rows.append(
            {
                "prompt_token_ids": ids[:start],
                "response_token_ids": ids[start:],
                "rollout_logprobs": columns[0],
                "trainer_logprobs": columns[1],
            }
        )
    return rows


def test_noise_of_rounding_is_reproduced_on_both_sides(drawn: Any, tmp_path: Path) -> None:
    path, model, sequences = drawn
    found = _diagnosed(tmp_path, _rows(model, sequences), path)
    assert found.outcome in ("rounding", "length-product")
    assert found.active is not None
    assert (found.active.settled, found.active.cause) == ("numerics", None)


def test_a_trainer_at_a_temperature_that_nobody_sampled_with(drawn: Any, tmp_path: Path) -> None:
    path, model, sequences = drawn
    a = lambda ids, start: _column(model, ids, start, lambda x, *_: x / 0.8)  # noqa: E731
    found = _diagnosed(tmp_path, _rows(model, sequences, a=a), path).active
    assert found is not None
    assert found.cause is not None
    assert (found.cause.name, found.cause.side) == ("trainer-temperature", "trainer")
    assert found.cause.parameters["temperature"] == pytest.approx(0.8, abs=0.01)
    assert found.cause.after < found.cause.before / 3


def test_a_rollout_with_a_repetition_penalty(drawn: Any, tmp_path: Path) -> None:
    path, model, sequences = drawn
    found = _diagnosed(
        tmp_path, _rows(model, sequences, b=lambda ids, start: _column(model, ids, start, _penalty)), path
    ).active
    assert found is not None
    assert found.cause is not None
    assert (found.cause.name, found.cause.side) == ("repetition-penalty", "rollout")
    assert found.cause.parameters["repetition"] == pytest.approx(1.3, abs=0.01)


def test_a_rollout_with_older_weights(drawn: Any, tmp_path: Path) -> None:
    path, model, sequences = drawn
    older = _altered(path)
    older.save_pretrained(tmp_path / "older")
    rows = _rows(model, sequences, b=lambda ids, start: _column(older, ids, start))
    found = _diagnosed(tmp_path, rows, path, older_checkpoint=tmp_path / "older").active
    assert found is not None
    assert found.cause is not None
    assert (found.cause.name, found.cause.side) == ("older-weights", "rollout")
    without = _diagnosed(tmp_path, rows, path).active
    assert without is not None
    assert (without.settled, without.side, without.cause) == ("side", "rollout", None)
    assert "--older-checkpoint" in {one.needs for one in without.left}


def test_packed_rows_that_leak(drawn: Any, tmp_path: Path) -> None:
    path, model, sequences = drawn
    packs = [list(range(i, i + 4)) for i in range(0, len(sequences), 4)]
    leaked: dict[int, list[float]] = {}
    for pack in packs:
        flat = [token for i in pack for token in sequences[i][0]]
        positions = torch.cat([torch.arange(len(sequences[i][0])) for i in pack])[None]
        with torch.no_grad():
            logits = model(
                torch.tensor([flat]), position_ids=positions, attention_mask=torch.ones(1, len(flat), dtype=torch.long)
            ).logits[0]
        at = 0
        for i in pack:
            ids, start = sequences[i]
            rows = logits[at + start - 1 : at + len(ids) - 1].double().log_softmax(-1)
            leaked[i] = rows[torch.arange(len(rows)), torch.tensor(ids[start:])].tolist()
            at += len(ids)
    index = {tuple(ids): i for i, (ids, _) in enumerate(sequences)}
    rows = _rows(model, sequences, a=lambda ids, start: leaked[index[tuple(ids)]])
    for i, row in enumerate(rows):
        row |= {"pack_id": i // 4, "pack_index": i % 4}
    found = _diagnosed(tmp_path, rows, path).active
    assert found is not None
    assert found.cause is not None
    assert (found.cause.name, found.cause.side) == ("packing-leak", "trainer")


def test_the_engine_goes_over_the_ids_by_prefill_and_by_decode(drawn: Any, tmp_path: Path) -> None:
    """Both are the trainer's: what was recorded was computed with other weights, which nobody named."""
    path, model, sequences = drawn
    other = _altered(path)
    rows = _rows(model, sequences, b=lambda ids, start: _column(other, ids, start))
    found = _diagnosed(tmp_path, rows, path, engine_dtype="float32").active
    assert found is not None
    assert (found.settled, found.side, found.cause) == ("side", "rollout", None)
    passes = {one.hypothesis: one.sizes for one in found.experiments if one.name == "engine"}
    assert set(passes) == {"the engine's prefill", "the engine's decode"}
    for sizes in passes.values():
        assert sizes is not None
        assert sizes.trainer <= 2 * found.floor < sizes.rollout
