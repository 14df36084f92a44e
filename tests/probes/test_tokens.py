"""The token view holds what the tables hold, of the sequences that it names."""

from __future__ import annotations

from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.errors import UsageError
from mismatch_probe.probes.analysis import LONGEST, analyse, token_view, window
from mismatch_probe.report.model import Token
from mismatch_probe.run import Run
from mismatch_probe.runs.comparison import RunDirectory


def rows(run: RunDirectory, pass_id: str, sequence_id: int) -> list[dict[str, Any]]:
    return [row for row in run.tokens(pass_id).to_pylist() if row["sequence_id"] == sequence_id]


def test_a_sequence_is_that_of_the_tables(finished: Run) -> None:
    run = RunDirectory.open(finished.path)
    worst = finished.data.worst_tokens[0]
    pair = next(p for p in finished.summary.pairs if p.rollout_dtype == p.trainer_dtype == worst.pair)
    (found, *_) = [
        s for s in mismatch_probe.Run.open(finished.path).tokens(worst.sequence_id) if s.title.startswith(worst.pair)
    ]
    rollout, trainer = (rows(run, pass_id, worst.sequence_id) for pass_id in (pair.rollout_pass, pair.trainer_pass))
    assert [token.rollout_logprob for token in found.tokens] == [row["logprob"] for row in rollout]
    assert [token.trainer_logprob for token in found.tokens] == [row["logprob"] for row in trainer]
    assert [(token.entropy, token.rank) for token in found.tokens] == [(row["entropy"], row["rank"]) for row in trainer]
    token = found.tokens[worst.position]
    assert (token.text, token.trainer_logprob - token.rollout_logprob) == (worst.token_text, worst.log_ratio)


def test_a_report_shows_the_worst_sequence_of_each_pair(finished: Run) -> None:
    titles = [sequence.title for sequence in finished.data.tokens]
    for worst in {token.pair: token for token in reversed(finished.data.worst_tokens)}.values():
        assert any(title.startswith(f"{worst.pair}: sequence {worst.sequence_id} of") for title in titles)


def test_a_sequence_that_is_not_there(finished: Run) -> None:
    with pytest.raises(UsageError, match="987654"):
        mismatch_probe.Run.open(finished.path).tokens(987_654)


def test_a_sequence_without_tokens_is_left_out(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model can answer with the end of the text alone."""
    empty = finished.data.worst_tokens[0].sequence_id
    read = RunDirectory.iter_tokens

    def without(self: RunDirectory, *args: Any, ids: tuple[int, int] | None = None, **options: Any) -> Any:
        return iter(()) if ids == (empty, empty) else read(self, *args, ids=ids, **options)

    monkeypatch.setattr(RunDirectory, "iter_tokens", without)
    run = RunDirectory.open(finished.path)
    shown = token_view(run, analyse(run).diagonal)
    assert shown
    assert not any(f"sequence {empty} of" in sequence.title for sequence in shown)
    with pytest.raises(UsageError, match=f"tokens of sequence {empty}"):
        mismatch_probe.Run.open(finished.path).tokens(empty)


def test_the_command(finished: Run, command: Any) -> None:
    outcome = command("report", str(finished.path), "--tokens", str(finished.data.worst_tokens[0].sequence_id))
    assert outcome.code == 0
    assert "|d| in nats" in outcome.out


@pytest.mark.parametrize(("worst", "first"), [(0, 0), (3000, 3000 - LONGEST // 2), (4999, 5000 - LONGEST)])
def test_a_long_sequence_is_shown_around_its_worst_token(worst: int, first: int) -> None:
    tokens = [Token("x", -1.0, -1.0 - 0.5 * (index == worst)) for index in range(5000)]
    assert window(tokens, LONGEST) == (first, first + LONGEST)
    assert window(tokens, None) == (0, 5000)
