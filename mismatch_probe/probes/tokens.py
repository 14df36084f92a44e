"""Single tokens of a run: the worst of each pair, and sequences for the token view: the worst and some others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.frame import PassSequences, pass_sequences
from mismatch_probe.probes.pairs import PairResult, PassPair, why_missing
from mismatch_probe.report.data import WorstToken
from mismatch_probe.report.model import Token, TokenSequence
from mismatch_probe.runs.comparison import RunDirectory

WORST, OTHERS = 2, 2
"""Sequences of a pair with the largest |d|, and evenly spaced ones beside them."""
LONGEST = 1200
"""Tokens of a sequence that are shown, around the one with the largest |d|."""


def token_view(run: RunDirectory, diagonal: Mapping[str, PairResult]) -> tuple[TokenSequence, ...]:
    """The sequences that a report shows of each pair.

    Raises:
        TableError: A table is missing or corrupt.
    """
    found: list[TokenSequence] = []
    for name, result in diagonal.items():
        pair, sequences = result.passes, pass_sequences(run, str(result.passes.rollout))
        worst = list(dict.fromkeys(sequences.ids[result.sums.largest.sequence].tolist()))[:WORST]
        spaced = np.linspace(0, len(sequences.ids) - 1, min(OTHERS, len(sequences.ids))).round().astype(int)
        others = [i for i in dict.fromkeys(sequences.ids[spaced].tolist()) if i not in worst]
        for kind, ids in (("largest |d|", worst), ("sample", others)):
            found += [_sequence(run, name, pair, sequences, sequence_id, kind) for sequence_id in ids]
    return tuple(sequence for sequence in found if sequence.tokens)


def tokens_of(run: RunDirectory, sequence_id: int) -> tuple[TokenSequence, ...]:
    """One sequence, whole, in every pair of equal dtypes that has it.

    Raises:
        UsageError: No such pair has the sequence.
        TableError: A table is missing or corrupt.
    """
    passes = run.passes
    found: dict[str, TokenSequence] = {}
    for pair in (PassPair(rollout, trainer) for rollout in passes.rollouts for trainer in passes.trainers):
        name = pair.diagonal
        if name and name not in found and not why_missing(run, pair):
            sequences = pass_sequences(run, str(pair.rollout))
            if sequence_id in sequences.ids:
                found[name] = _sequence(run, name, pair, sequences, sequence_id, "", longest=None)
    found = {name: sequence for name, sequence in found.items() if sequence.tokens}
    if not found:
        raise UsageError(
            f"No compared pair has tokens of sequence {sequence_id}.", "The report's worst tokens name sequences."
        )
    return tuple(found.values())


def _sequence(
    run: RunDirectory,
    name: str,
    pair: PassPair,
    sequences: PassSequences,
    sequence_id: int,
    kind: str,
    longest: int | None = LONGEST,
) -> TokenSequence:
    columns = ["position", "logprob"]
    rollout = _rows(run, str(pair.rollout), [*columns, "token_text"], sequence_id)
    trainer = _rows(run, str(pair.trainer), [*columns, "entropy", "rank"], sequence_id)
    pairs = zip(rollout, trainer, strict=True)
    tokens = [
        Token(here["token_text"] or "", here["logprob"], there["logprob"], there["entropy"], there["rank"])
        for here, there in pairs
    ]
    prompt = sequences.prompt_ids[sequences.prompt[np.searchsorted(sequences.ids, sequence_id)]]
    title = f"{name}: sequence {sequence_id} of prompt {prompt}" + (f" ({kind})" if kind else "")
    first, last = window(tokens, longest)
    if last - first < len(tokens):
        title += f", tokens {first + 1:,} to {last:,} of {len(tokens):,}"
    return TokenSequence(title, tuple(tokens[first:last]))


def window(tokens: list[Token], longest: int | None) -> tuple[int, int]:
    """The part to show: all, or `longest` tokens around the one with the largest |d|."""
    if longest is None or len(tokens) <= longest:
        return 0, len(tokens)
    sizes = [abs(token.trainer_logprob - token.rollout_logprob) for token in tokens]
    worst = int(np.argmax(np.nan_to_num(sizes, nan=np.inf)))
    first = min(max(0, worst - longest // 2), len(tokens) - longest)
    return first, first + longest


def _rows(run: RunDirectory, pass_id: str, columns: list[str], sequence_id: int) -> list[dict[str, Any]]:
    """The rows of a sequence; none of an empty one."""
    batches: Iterable[pa.Table] = run.iter_tokens(pass_id, ["sequence_id", *columns], ids=(sequence_id, sequence_id))
    return [row for batch in batches for row in batch.filter(pc.equal(batch["sequence_id"], sequence_id)).to_pylist()]


_CONTEXT_TOKENS = 16


def worst_tokens(run: RunDirectory, name: str, result: PairResult) -> list[WorstToken]:
    """The tokens with the largest |d| of a pair that reports call `name`; only their surroundings are read."""
    pass_id, sums = str(result.passes.rollout), result.sums
    sequences = pass_sequences(run, pass_id)
    square = float(sums.binned["probability"].squared_log_ratio.sum())
    tokens = []
    for row, sequence, position, rollout, trainer in zip(*vars(sums.largest).values(), strict=True):
        sequence_id = int(sequences.ids[sequence])
        # Masked tokens have no row, so that the rows before this one can be of another sequence.
        first = max(0, int(row) - min(int(position), _CONTEXT_TOKENS))
        columns = ["sequence_id", "token_id", "token_text"]
        batches = run.iter_tokens(pass_id, columns, rows=range(first, int(row) + 1))
        rows = [piece for batch in batches for piece in batch.to_pylist() if piece["sequence_id"] == sequence_id]
        *before, text = [piece["token_text"] or "" for piece in rows]
        difference = float(trainer - rollout)
        tokens.append(
            WorstToken(
                pair=name,
                sequence_id=sequence_id,
                prompt_id=sequences.prompt_ids[sequences.prompt[sequence]],
                position=int(position),
                token_id=rows[-1]["token_id"],
                token_text=text,
                context="".join(before),
                rollout_logprob=float(rollout),
                trainer_logprob=float(trainer),
                log_ratio=difference,
                contribution=difference**2 / square if square > 0 else 0.0,
            )
        )
    return tokens
