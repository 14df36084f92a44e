"""`attribute/attribution.json`: where the gap of one pair arises, and what an attribution plans to run.

Contributions and fractions are parts of E[d²], the mean squared gap over response tokens; d is trainer − rollout
log-prob in nats.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mismatch_probe.metrics.inside import Inside
from mismatch_probe.metrics.ladder import Change, Fix, Gap
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

Side = Literal["rollout", "trainer"]
Where = Literal["neither", "rollout", "trainer", "both"]
WHERE: tuple[Where, ...] = ("neither", "rollout", "trainer", "both")
NotRun = Literal["unsupported", "failed", "skipped"]
"""Why there is no number: it does not exist for this model or machine; it was tried; it was left out or not run yet."""
NO_GAP = ("no-gap", "gap-not-known")
"""Codes of findings with which nothing is to be explained."""
RungKey = Literal["prefill", "engine", "dtype", "layout", "mode"]
PassKey = Literal["sampled", "prefill", "rollout-dtype", "rollout-batching", "cast", "trained"]


class SelfNoise(Result):
    """RMS by which each side differs from itself, run again without a change, nats: a smaller shift means nothing."""

    rollout: MetricValue
    """Of the engine, decoding the same tokens again."""
    trainer: MetricValue
    """Of the trainer, scoring the same tokens again."""


class LadderRung(Result):
    """One change between two neighbouring passes of the ladder."""

    key: RungKey
    """What changes."""
    before: PassKey
    """The pass below."""
    after: PassKey
    """The pass above."""
    rms: MetricValue
    """RMS of the difference that the change makes, nats."""
    mean: MetricValue
    """Its mean, nats: the rung's bias."""
    contribution: MetricValue
    """To E[d²], as a fraction. Contributions add up to 1; one that undoes what others did is negative."""


class LadderPass(Result):
    """One pass of the ladder."""

    key: PassKey
    """Which."""
    error_rms: MetricValue | None
    """RMS of its log-probs against the trainer's FP32 pass, nats; None where the run has no such pass."""


class Ladder(Result):
    """The chain of passes from what the engine sampled to what the trainer trains on, one change at a time."""

    rungs: tuple[LadderRung, ...]
    """In order; empty where a pass is missing."""
    passes: tuple[LadderPass, ...]
    """In order; empty where one is missing."""
    n_nonfinite: int
    """Tokens that are not finite in some pass, and left out of all rungs."""
    squares_over_gap: float | None
    """Σ of the rungs' mean squares over E[d²]: 1 where rungs are independent, more where they undo each other."""
    why: str
    """Why there is no ladder; empty where there is one."""


class SettingResult(Result):
    """What one setting of one side does to the gap."""

    name: str
    """`side-key`, also the file of its pass."""
    side: Side
    """Whose setting."""
    key: str
    """The same on both sides where it is the same setting."""
    change: str
    """What it changes, as a phrase."""
    options: tuple[str, ...]
    """Options of `mismatch-probe compare` that set it; empty where none do."""
    environment: dict[str, str]
    """Environment variables that set it."""
    status: Literal["measured", "unsupported", "failed", "skipped"]
    """Whether there is a number; else as in `NotRun`."""
    why: str
    """Why there is no number; empty where there is one."""
    effect: Change | None = None
    """What it does to the gap; None unless measured. All settings, and those of both sides, are one family of tests."""
    n_tokens: int | None = None
    """Response tokens that it was measured on."""
    n_nonfinite: int | None = None
    """Of those, tokens whose log-prob is not finite with the setting."""
    time_ratio: float | None = None
    """Time of its pass over that of the pass without it; None where they cover different tokens."""
    peak_gib: float | None = None
    """Peak memory of its pass, GiB; None where it is not known."""
    memory_ratio: float | None = None
    """`peak_gib` over that of the pass without the setting."""
    notes: tuple[Finding, ...] = ()
    """What changed along with it, or kept it from doing anything."""


class BothSides(Result):
    """A setting that exists on both sides, on neither, one, and both."""

    key: str
    """The setting's."""
    variants: dict[Where, Change]
    """What each does to the gap, against that with the setting on neither side; empty where a pass is missing."""
    best: Where | None
    """The variant with the smallest RMS."""
    hurts: tuple[Where, ...]
    """Variants that make the gap larger, at 5 % for all tests together."""
    why: str
    """Why it was not measured; empty where it was."""


class LeftInFp32(Result):
    """What FP32 on both sides leaves of the gap, over the same tokens."""

    rms: MetricValue
    """RMS of what is left, nats."""
    fraction: MetricValue
    """Of E[d²]."""


class Layers(Result):
    """Both models layer by layer and module by module."""

    dtypes: dict[str, Inside]
    """By dtype."""
    threshold: float
    """Scores beyond it are more than rounding explains."""
    rollout_eager: bool
    """Whether the compared rollout ran in eager mode, which layers are recorded in."""
    eager_vs_compiled_shift: MetricValue | None
    """RMS between eager and compiled log-probs of the engine, nats; None where it was not measured."""
    why: str
    """Why no layer was compared; empty where one was."""


class FixResult(Result):
    """One set of classes of modules in FP32."""

    classes: tuple[str, ...]
    """Their names, in the order in which they were added."""
    status: Literal["measured", "unsupported", "failed", "skipped"]
    """As of a setting."""
    why: str
    """Why there is no number; empty where there is one."""
    effect: Change | None = None
    """What it does to the gap."""
    trainer_error_ratio: MetricValue | None = None
    """RMS of the trainer's own error against FP32, over that without; None where the run has no FP32 pass."""
    added_time: float | None = None
    """Time that it adds, as a fraction of the trainer's."""


class Fixes(Result):
    """Classes of the trainer's modules computed in FP32: what each leaves of the gap, and what it costs."""

    rows: tuple[FixResult, ...]
    """The smallest gap first, then those without a number."""
    target: float | None
    """Largest fraction of the gap's RMS that may be left; None where no set is looked for."""
    whole_trainer_in_fp32: MetricValue | None
    """RMS of the gap that a trainer wholly in FP32 leaves, over that without; None where the run has no such pass."""
    cheapest: Fix | None
    """The set that meets the target at the least added time; None where none does."""
    why: str
    """Why no set is looked for, or nothing was tried; empty otherwise."""


class RouterLayer(Result):
    """The router of one layer."""

    layer: int
    """Index of the layer."""
    agreement: float
    """Fraction of tokens for which both sides choose the same experts."""


class Experts(Result):
    """Routers of a mixture of experts. The gap here is the trainer's to the prefill pass whose routes were kept."""

    why: str
    """Why routers were not compared; empty where they were."""
    layers: tuple[RouterLayer, ...] = ()
    """In order; empty where routers were not compared."""
    flipped_tokens: float | None = None
    """Fraction of tokens that a router sends to other experts in some layer."""
    contribution: MetricValue | None = None
    """Of those tokens to E[d²]."""
    own_routes: Gap | None = None
    """The gap with the trainer's own routes."""
    engine_routes: Change | None = None
    """The gap once the trainer is given the engine's routes."""


class Attribution(Document):
    """Where the gap of one pair arises: rung by rung, setting by setting, layer by layer."""

    KIND: ClassVar[str] = "attribution"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe attribute --from {folder.parent}"

    model: str
    """As the user named it."""
    device: str
    """`cpu` or `cuda`."""
    rollout_pass: str
    """Of the pair."""
    trainer_pass: str
    """Of the pair."""
    rollout_dtype: str
    """In which the engine sampled."""
    trainer_dtype: str
    """In which the trainer scored."""
    trainer_mode: str
    """`cast` or `autocast`."""
    trainer_layout: str
    """How the trainer batches: `single`, `padded` or `packed`."""
    n_tokens: int
    """Response tokens of the pair."""
    n_sequences: int
    """Sequences of the pair."""
    n_nonfinite: int
    """Tokens that are not finite on one side, and left out."""
    n_impossible: int
    """Tokens with a log-prob that is none (a placeholder, a positive value), and left out."""
    gap: Gap
    """How large it is."""
    self_noise: SelfNoise
    """Each side against itself."""
    ladder: Ladder
    """Where it arises, change by change."""
    settings: tuple[SettingResult, ...]
    """Every setting of both sides, measured or not."""
    both_sides: tuple[BothSides, ...]
    """Settings that exist on both sides."""
    layers: Layers
    """Both models' insides."""
    left_in_fp32: LeftInFp32
    """What rounding cannot explain."""
    fixes: Fixes
    """FP32 modules at the trainer."""
    experts: Experts | None
    """None for a dense model."""
    failed: dict[str, str]
    """Passes that were tried and failed, with the reason."""
    findings: tuple[Finding, ...]
    """What all of it comes to: the `answer`, then faults, what closes part of the gap, and the rest."""

    @property
    def answer(self) -> tuple[Finding, ...]:
        """Where the gap arises, and a fault that makes it or whether rounding does; one finding without a gap."""
        return self.findings[:1] if self.findings[0].code in NO_GAP else self.findings[:2]


class PlannedProcess(Result):
    """A process that would run."""

    name: str
    """A pass of the comparison, or a process of the attribution."""
    n_passes: int
    """Passes that it makes."""
    seconds: float
    """Rough time."""


class PlannedSetting(Result):
    """A setting, and whether it would be measured."""

    name: str
    """`side-key`."""
    change: str
    """What it changes, as a phrase."""
    why: str
    """Why it would not be measured; empty where it would."""


class AttributionPlan(Result):
    """What an attribution would run, before anything has run."""

    model: str
    """As the user named it."""
    device: str
    """`cpu` or `cuda`."""
    passes: tuple[PlannedProcess, ...]
    """Of the comparison."""
    processes: tuple[PlannedProcess, ...]
    """Of the attribution."""
    settings: tuple[PlannedSetting, ...]
    """Every setting of both sides."""
    seconds: float
    """Rough time of everything."""
    disk_gib: float
    """GiB that recorded layers take at most while they are compared."""
    findings: tuple[Finding, ...] = ()
    """What of the checkpoint will fail or surprise; empty where it is not on this disk."""
