"""From a run's tables to its summary, its report and its single tokens. No engine: `compare`, `report` and `plot` all
end here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mismatch_probe.config import Limit
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.metrics import curves
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.catalog import metric_info
from mismatch_probe.metrics.curves import where
from mismatch_probe.metrics.frame import PassSequences, pass_sequences, self_noise_of
from mismatch_probe.metrics.length import LengthFit, fit_length
from mismatch_probe.metrics.length_prediction import LengthForecast, forecast
from mismatch_probe.metrics.paired import compare_pairs
from mismatch_probe.metrics.ratio_test import RatioTest, adjusted_together
from mismatch_probe.passes import PassId
from mismatch_probe.probes.findings import findings, format_ratio
from mismatch_probe.probes.groups import recorded_groups
from mismatch_probe.probes.pairs import PairResult, PassPair, analyse_pair, why_missing
from mismatch_probe.report.data import Curves, ReportData, WorstToken
from mismatch_probe.report.model import Token, TokenSequence
from mismatch_probe.results.attribution import Attribution
from mismatch_probe.results.comparison import (
    Comparison,
    Crossing,
    LengthGrowth,
    LimitCheck,
    LimitVerdict,
    MissingPair,
    Pair,
    PairName,
    PairSelfNoise,
    SelfNoisePass,
)
from mismatch_probe.runs.comparison import RunDirectory

WORST, OTHERS = 2, 2
"""Sequences of a pair with the largest |d|, and evenly spaced ones beside them."""
LONGEST = 1200
"""Tokens of a sequence that are shown, around the one with the largest |d|."""
_CONTEXT_TOKENS = 16


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


def analyse(run: RunDirectory, ratio_limits: Sequence[float] | None = None) -> Analysis:
    """Reads a run's tables, each pair of passes once.

    Args:
        run: A run directory; passes that are missing leave their pairs missing, with the reason.
        ratio_limits: Factors of F(τ) beside the fixed one; those of the run's configuration for None.

    Raises:
        TableError: A table is missing or corrupt.
    """
    passes, results, missing, seed = run.passes, [], [], run.manifest.config.seed
    recorded = recorded_groups(run)
    limits = run.manifest.config.ratio_limits if ratio_limits is None else ratio_limits
    for both in [PassPair(rollout, trainer) for rollout in passes.rollouts for trainer in passes.trainers]:
        why = why_missing(run, both)
        if why:
            missing.append(MissingPair(**dict(both.name), why=why))
        else:
            results.append(analyse_pair(run, passes, both, seed, recorded, limits))
    others = [both for pair in passes.beside if not why_missing(run, both := PassPair(*pair))]
    beside = [analyse_pair(run, passes, both, seed, recorded, limits).pair for both in others]
    noise = {name: found for name in run.finished_passes() if (found := _self_noise_pass(run, name)) is not None}
    together = adjusted_together([result.pair.ratio_tests for result in results]) if results else []
    completed = [_completed(result, tests, noise) for result, tests in zip(results, together, strict=True)]
    return Analysis(run, tuple(completed), tuple(missing), noise, tuple(beside))


@dataclass(frozen=True)
class Analysis:
    """What a run's tables say, before limits and lengths are chosen.

    Attributes:
        run: The run.
        results: Of every pair that can be compared.
        missing: The other pairs.
        noise: Self-noise by pass.
        beside: What else a dump brought.
    """

    run: RunDirectory
    results: tuple[PairResult, ...]
    missing: tuple[MissingPair, ...]
    noise: Mapping[str, SelfNoisePass]
    beside: tuple[Pair, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What the summary says of each pair."""
        return tuple(result.pair for result in self.results)

    @cached_property
    def diagonal(self) -> dict[str, PairResult]:
        """Pairs of equal dtypes; of several trainer modes the first one stands for the dtype."""
        found = {r.passes.diagonal: r for r in reversed(self.results) if r.passes.diagonal}
        return {name: found[name] for name in reversed(found)}

    @cached_property
    def _fits(self) -> dict[str, LengthFit]:
        seed, prefixes = self.run.manifest.config.seed, {n: r.prefixes for n, r in self.diagonal.items()}
        return {name: fit_length(found, seed=seed) for name, found in prefixes.items() if found is not None}

    def forecasts(self, lengths: Sequence[int], *, extrapolate: bool) -> dict[str, LengthForecast]:
        """Predictions for longer responses, by dtype; on-policy pairs only.

        Args:
            lengths: Response lengths, tokens.
            extrapolate: Whether to predict beyond 8 times the observed length.
        """
        return {name: forecast(fit, lengths=lengths, extrapolate=extrapolate) for name, fit in self._fits.items()}

    def report(
        self,
        limits: Sequence[Limit] = (),
        *,
        predict_lengths: Sequence[int] | None = None,
        extrapolate: bool | None = None,
    ) -> ReportData:
        """Everything that is shown of the run but the token view.

        Args:
            limits: What `--fail-on` asked for.
            predict_lengths: Response lengths to predict; those of the run's configuration for None.
            extrapolate: Whether to predict beyond 8 times the observed length; likewise.

        Raises:
            TableError: Nothing can be compared.
        """
        run, config, pairs, missing = self.run, self.run.manifest.config, self.pairs, self.missing
        if not pairs:
            reasons = "; ".join(sorted({row.why.rstrip(".") for row in missing}))
            raise TableError(
                f"Nothing can be compared: {reasons}.", "See the reasons, fix them, and continue with --resume."
            )
        forecasts = self.forecasts(
            config.predict_lengths if predict_lengths is None else predict_lengths,
            extrapolate=config.extrapolate if extrapolate is None else extrapolate,
        )
        sums = {name: result.sums for name, result in self.diagonal.items()}
        same = {name: result.pair for name, result in self.diagonal.items()}
        ratio = format_ratio(self.diagonal, config.seed)
        reference = run.passes.reference
        summary = Comparison(
            **Comparison.stamp(),
            model=run.manifest.model.name,
            reference=None if reference is None else str(reference),
            pairs=pairs,
            missing=missing,
            beside=self.beside,
            self_noise=tuple(self.noise.values()),
            where={name: {key: tuple(bins) for key, bins in where(pair).items()} for name, pair in sums.items()},
            comparisons=tuple(compare_pairs(sums, seed=config.seed)),
            length={name: growth_of(found) for name, found in forecasts.items()},
            findings=findings(pairs, same, ratio, forecasts, run.manifest.status),
            limits=tuple(row for limit in limits for row in judge(limit, pairs, missing)),
        )
        worst = [token for name, result in self.diagonal.items() for token in worst_tokens(run, name, result)]
        return ReportData(
            summary=summary,
            manifest=run.manifest,
            curves=_curves(sums, forecasts),
            worst_tokens=worst,
            attribution=read_attribution(run),
            folder=run.path,
        )


def read_attribution(run: RunDirectory) -> Attribution | None:
    """A run's attribution; None where its gap has not been taken apart.

    Raises:
        TableError: It is damaged, or of a schema that is not read here.
    """
    path = run.path / "attribute" / "attribution.json"
    return Attribution.read(path) if path.exists() else None


def _completed(result: PairResult, tests: Sequence[RatioTest], noise: Mapping[str, SelfNoisePass]) -> PairResult:
    """A pair with what takes the other pairs and passes to know."""
    rollout, trainer = (noise.get(side) for side in (result.pair.rollout_pass, result.pair.trainer_pass))
    both = PairSelfNoise(rollout=rollout, trainer=trainer)
    return replace(result, pair=result.pair.model_copy(update={"ratio_tests": tuple(tests), "self_noise": both}))


def growth_of(found: LengthForecast) -> LengthGrowth:
    """What the summary says of a forecast."""
    fit = found.fit
    return LengthGrowth(
        observed_length=fit.observed_length,
        n_sequences=fit.n_sequences,
        n_prompts=fit.n_prompts,
        n_cut=fit.n_cut,
        variance_exponent=fit.variance_exponent,
        variance_ratio=fit.variance_ratio,
        seq_log_ratio_mean=fit.mean,
        model_weight=fit.model_weight,
        trend_weight=fit.trend_weight,
        contradicted=fit.contradicted,
        why=fit.why,
        predictions=found.predictions,
        crossings=tuple(Crossing(ess_seq=ess, length=length) for ess, length in found.crossings.items()),
    )


def _self_noise_pass(run: RunDirectory, pass_id: str) -> SelfNoisePass | None:
    found = PassId.parse(pass_id)
    repeat = str(found.repeat)
    if found.variant or not run.finished(repeat):
        return None
    measured = self_noise_of(run, pass_id, repeat)
    return SelfNoisePass(
        pass_id=pass_id, self_noise_pass=repeat, engine=found.engine, dtype=found.dtype, measured=measured
    )


def judge(limit: Limit, pairs: Sequence[Pair], missing: Sequence[MissingPair]) -> list[LimitCheck]:
    """One row per pair that a limit applies to. What cannot be judged is inconclusive, and says why."""
    rows = []
    everything: list[Pair | MissingPair] = [*pairs, *missing]
    for pair in everything:
        if limit.applies_to(pair.rollout_dtype, pair.trainer_dtype):
            value, why, whole = _limited(limit.metric, pair)
            verdict: LimitVerdict = "ok" if whole else "inconclusive"
            if value is None:
                verdict = "inconclusive"
            elif limit.exceeded_by(value):
                verdict = "fail"
            name = {field: getattr(pair, field) for field in PairName.model_fields}
            rows.append(LimitCheck(**name, limit=limit.text, value=value, verdict=verdict, why=why))
    return rows


def _limited(metric: str, pair: Pair | MissingPair) -> tuple[float | None, str, bool]:
    """A metric's value, what limits it, and whether it is of the whole pair."""
    if isinstance(pair, MissingPair):
        return None, pair.why, False
    found = pair.metrics[metric]
    if (info := metric_info(metric)) and info.level == "exact" and pair.n_nonfinite_exact:
        why = f"the exact KL is not finite at {pair.n_nonfinite_exact} compared positions, so it is never ok"
        return found.value, why, False
    if pair.n_excluded:
        why = f"{pair.n_excluded} of {pair.n_tokens} tokens have no usable log-probs, so the pair is never ok"
        return found.value, why, False
    return found.value, found.why, True


def _curves(sums: Mapping[str, PairSums], forecasts: Mapping[str, LengthForecast]) -> Curves:
    return Curves(
        density={name: curves.policy_density(pair) for name, pair in sums.items()},
        length={name: curves.length_curve(pair) for name, pair in sums.items()},
        ccdf={name: curves.abs_diff_ccdf(pair) for name, pair in sums.items()},
        by_probability={name: curves.abs_diff_by_probability(pair) for name, pair in sums.items()},
        by_position={name: curves.abs_diff_by_position(pair) for name, pair in sums.items()},
        forecast=dict(forecasts),
    )
