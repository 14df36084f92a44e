"""The tokens of a pair that differ most, each with the text before it."""

from __future__ import annotations

from mismatch_probe.metrics.frame import pass_sequences
from mismatch_probe.probes.pairs import PairResult
from mismatch_probe.report.data import WorstToken
from mismatch_probe.runs.comparison import RunDirectory

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
