"""The document of an audit: verdicts with the checks behind them, and what was measured on the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.manifest import Environment
from mismatch_probe.results.ranges import PARTS, PartName, Range
from mismatch_probe.types import MetricValue

Level = Literal["ok", "warn", "fail"]
Verdict = Literal["ok", "warn", "fail", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("fail", "inconclusive", "warn", "ok")
"""The worst first."""


class Bounds(Result):
    """When a check warns and fails, and who says so."""

    warn_above: float | None = None
    """Limit of the value, in the value's unit."""
    fail_above: float | None = None
    """Limit of the value, in the value's unit."""
    warn_below: float | None = None
    """Limit of the value, in the value's unit."""
    fail_below: float | None = None
    """Limit of the value, in the value's unit."""
    event: Literal["warn", "fail"] | None = None
    """Of a rare event: what one occurrence is."""
    rate_below: float | None = Field(default=None, gt=0)
    """Of a rare event that did not occur, and of a maximum within its limits: the upper 95 % limit of the fraction of
    prompts that would show it has to be below this, or the check is inconclusive. Without it such a check is never ok.
    """
    within: float | None = Field(default=None, gt=0)
    """Of `one_sided`: the interval of the mean importance ratio has to lie within 1 ± this, or the check is
    inconclusive."""
    source: str = ""
    """Who set the limits."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.limits and self.event is None:
            raise ValueError("names no limit")
        for warn, fail, order in (("warn_above", "fail_above", 1), ("warn_below", "fail_below", -1)):
            first, second = getattr(self, warn), getattr(self, fail)
            if first is not None and second is not None and order * (second - first) < 0:
                raise ValueError(f"{warn} = {first:g} would never warn before {fail} = {second:g}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the value that there are, by name."""
        names = ("warn_above", "fail_above", "warn_below", "fail_below")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Settle(Result):
    """What would settle an inconclusive check. All fields are empty where nothing is known to."""

    more_prompts: int | None = None
    """Further prompts of the same kind that settle it if the value stays, to two digits upwards."""
    max_tokens: int | None = None
    """Response length that has to be sampled, tokens."""
    parts: tuple[PartName, ...] = ()
    """Measurements on the model that have to be made."""
    dtypes: tuple[str, ...] = ()
    """Dtypes that both sides have to run in, too."""
    trainer_modes: tuple[str, ...] = ()
    """Trainer modes that have to be run."""
    unknown: tuple[str, ...] = ()
    """Names of checks that none of this settles."""

    @classmethod
    def all_of(cls, needs: Iterable[Settle]) -> Settle:
        """What settles all of them together."""
        found = list(needs)
        return cls(
            more_prompts=max((n.more_prompts for n in found if n.more_prompts is not None), default=None),
            max_tokens=max((n.max_tokens for n in found if n.max_tokens is not None), default=None),
            parts=tuple(part for part in PARTS if any(part in n.parts for n in found)),
            dtypes=tuple(dict.fromkeys(name for n in found for name in n.dtypes)),
            trainer_modes=tuple(dict.fromkeys(name for n in found for name in n.trainer_modes)),
            unknown=tuple(dict.fromkeys(name for n in found for name in n.unknown)),
        )


class Check(Result):
    """One check of a precision pair. It is judged by its whole interval, or by the prompts that were seen."""

    name: str
    """A metric of the catalogue, or a check of the audit's own, e.g. `"fp16_headroom"`."""
    verdict: Verdict
    """`best` where that is `worst`, else `inconclusive`."""
    best: Level
    """The better of the verdicts that the data leave open."""
    worst: Level
    """The worse of them."""
    value: MetricValue
    """What was measured, in the metric's unit; None where nothing was, then `why` says so."""
    exact: bool
    """Whether the value was counted or computed over all there is, so that it needs no interval."""
    bounds: Bounds
    """Its limits."""
    finding: Finding
    """The evidence; `where` names the tensor that decides."""
    settle: Settle | None
    """What would settle it; None where it is not inconclusive."""


class PrecisionPair(Result):
    """A precision pair."""

    rollout_dtype: str
    """Dtype of the rollout engine; `recorded` for log-probs that a file brought."""
    trainer_dtype: str
    """Dtype of the trainer; `recorded` likewise."""
    trainer_mode: str
    """`cast`, `autocast` or `recorded`; empty for a pair that was not compared."""

    @property
    def dtypes(self) -> tuple[str, str]:
        """Rollout and trainer dtype."""
        return self.rollout_dtype, self.trainer_dtype

    @property
    def key(self) -> tuple[str, str, str]:
        """Names the pair."""
        return self.rollout_dtype, self.trainer_dtype, self.trainer_mode


class AuditedPair(PrecisionPair):
    """A precision pair with its checks."""

    n_tokens: int
    """Response tokens that were compared; 0 where the pair could not run."""
    n_prompts: int
    """Prompts that they answer."""
    verdict: Verdict
    """Fail where a check fails, inconclusive where one may, warn where one warns or may, else ok."""
    mean_abs_logprob_diff: MetricValue
    """Mean |d|, nats."""
    checks: tuple[Check, ...]
    """In the profile's order."""

    @property
    def name(self) -> PrecisionPair:
        """The pair alone."""
        return PrecisionPair(
            rollout_dtype=self.rollout_dtype, trainer_dtype=self.trainer_dtype, trainer_mode=self.trainer_mode
        )

    def check(self, name: str) -> Check | None:
        """A check by its name."""
        return next((check for check in self.checks if check.name == name), None)


class Answer(PrecisionPair):
    """What the audit says of one precision."""

    compared: bool
    """Whether there are checks of this pair."""
    decides: bool
    """Whether the verdict of the whole audit is of this pair."""
    verdict: Verdict
    """Of the pair; inconclusive where it was not compared."""
    check: str
    """The check that decides; empty where all are ok or the pair was not compared."""
    finding: Finding
    """The evidence that decides."""
    also: tuple[str, ...]
    """Other checks that would give the same verdict alone."""
    settle: Settle | None
    """What would settle the checks that are open and decide; None where none is."""


class TouchedTokens(Result):
    """What a correction would touch."""

    correction: Correction
    """The correction with its bounds."""
    fraction: MetricValue
    """Fraction of response tokens whose weight it caps, or that it masks."""


class Snippet(Result):
    """A piece of configuration that does what is recommended."""

    framework: Literal["trl", "verl", "vllm"]
    """Whose."""
    text: str
    """To be pasted."""
    notes: tuple[Finding, ...]
    """What the framework has no key for."""


class Recommendation(PrecisionPair):
    """What to do."""

    verdict: Verdict
    """Of the pair."""
    loss_scale: float | None
    """First loss scale; None where the trainer needs none or none can be named."""
    correction: Correction | None
    """Of importance weights; None for no correction."""
    alarm_kl_k3: float | None
    """KL per token, nats, that a run should not exceed; None where it was not measured."""
    findings: tuple[Finding, ...]
    """The reasons, each with its number."""
    corrections: tuple[TouchedTokens, ...]
    """What each correction would touch."""
    snippets: tuple[Snippet, ...]
    """Configurations."""


class ProfileName(Result):
    """The limits that were applied."""

    name: str
    """Of a shipped profile, or of a file without its suffix."""
    description: str
    """One sentence."""


class AskedFor(Result):
    """Settings of the audit."""

    profile: str
    """A shipped profile's name, or a TOML file."""
    planned_tokens: int
    """Response length of the RL run, tokens."""
    step_tokens: int
    """Response tokens that a training step's loss is averaged over."""
    learning_rates: tuple[float, ...]
    """At which the engine's lag is computed."""
    pairs: tuple[str, ...]
    """`rollout/trainer` that decide; the recommended pair where there are none."""
    strict: bool
    """Whether a warning closes the gate."""


class Change(Result):
    """Something that two audits were made differently with."""

    what: str
    """Its name, dotted."""
    before: JsonValue
    """In the baseline, None where it was absent."""
    after: JsonValue
    """Now, None where it is absent."""


class ValueChange(Result):
    """How a value has changed."""

    kind: Literal["ratio", "difference"]
    """After over before, or after minus before."""
    value: float
    """The change."""
    ci_low: float | None
    """Lower 95 % limit, the two audits counted as independent; None where either has no interval."""
    ci_high: float | None
    """Upper limit."""


class CheckChange(PrecisionPair):
    """A check in two audits."""

    name: str
    """The check; `verdict` for a pair that was usable and is no longer shown to be."""
    before: float | None
    """Its value in the baseline."""
    after: float | None
    """Its value now."""
    verdict_before: Verdict
    """In the baseline."""
    verdict_after: Verdict
    """Now; inconclusive where the pair is gone."""
    change: ValueChange | None
    """None where either value is missing."""
    finding: Finding | None
    """Why it is a regression; None where it is none."""


class GoneCheck(PrecisionPair):
    """A check that the baseline has and this audit does not."""

    name: str
    """The check."""


class Baseline(Result):
    """Comparison with an older audit."""

    source: str
    """Where that lies."""
    model: str
    """Of it."""
    changed: tuple[Change, ...]
    """What differs in how the two were made."""
    checks: tuple[CheckChange, ...]
    """Every check that both have."""
    regressions: tuple[CheckChange, ...]
    """What is worse: pairs that were lost first."""
    gone: tuple[GoneCheck, ...]
    """What is no longer checked."""


class AuditProvenance(Result):
    """What could make the same audit come out differently."""

    created: str
    """When the comparison began, ISO 8601."""
    tool_version: str
    """Release that made it."""
    environment: Environment
    """Packages, machine and environment variables."""
    device: str
    """`cpu` or `cuda`."""
    config: CompareConfig
    """Settings of the comparison."""
    prompts_sha256: str | None
    """Digest of the prompts' token ids; None for recorded sequences."""
    model_files: dict[str, str] | None
    """Digest of each file of the model."""
    measured_with: dict[PartName, dict[str, str]]
    """By measurement on the model, versions of the packages that made it."""


class Audit(Document):
    """An audit: may the model go into RL, in which precision, with which correction?"""

    KIND: ClassVar[str] = "audit"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe audit --from {folder}"

    model: str
    """Its name."""
    n_prompts: int
    """Prompts of the comparison."""
    max_tokens: int
    """Longest response that was sampled, tokens."""
    verdict: Verdict
    """Of the pairs that decide; ok and warn open a gate, fail and inconclusive close it."""
    decided_by: tuple[PrecisionPair, ...]
    """The pairs that were asked for, or the recommended one."""
    answers: tuple[Answer, ...]
    """For FP16, BF16 and FP32 each, then for other pairs that were asked for."""
    findings: tuple[Finding, ...]
    """What holds of the whole model, e.g. that no log-prob is finite."""
    profile: ProfileName
    """Whose limits were applied."""
    options: AskedFor
    """What was asked for."""
    pairs: tuple[AuditedPair, ...]
    """Every pair with its checks."""
    recommendation: Recommendation | None
    """None where no pair ran, or none can be recommended."""
    range: Range
    """What was measured on the model itself."""
    missing: tuple[Finding, ...]
    """What was asked for and is not there, with the reason."""
    provenance: AuditProvenance
    """How it was made."""
    baseline: Baseline | None
    """Comparison with an older audit; None where none was named."""

    def pair(self, name: PrecisionPair) -> AuditedPair | None:
        """A pair by its name."""
        return next((pair for pair in self.pairs if pair.key == name.key), None)

    @property
    def deciding(self) -> tuple[AuditedPair, ...]:
        """The pairs that the verdict is of."""
        keys = {name.key for name in self.decided_by}
        return tuple(pair for pair in self.pairs if pair.key in keys)

    @property
    def regressed(self) -> bool:
        """Whether something is worse than in the baseline."""
        return self.baseline is not None and bool(self.baseline.regressions)

    @property
    def failed(self) -> bool:
        """Whether a gate has to close."""
        bad = ("fail", "inconclusive", "warn") if self.options.strict else ("fail", "inconclusive")
        return self.verdict in bad or self.regressed
