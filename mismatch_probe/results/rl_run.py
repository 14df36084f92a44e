"""An RL run: what it was asked to do, where it runs, how it ended, and what its steps show. The file is `run.json`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import JsonValue

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.manifest import Environment
from mismatch_probe.types import MetricValue

Status = Literal["complete", "collapsed", "diverged"]
Learning = Literal["rose", "flat", "fell", "unknown"]
# The collapse rule: the last window's mean reward is below this fraction of the best earlier window's, and lower by
# more than so many standard errors.
COLLAPSE_BELOW = 0.5
COLLAPSE_ERRORS = 6.0


class TrainedModel(Result):
    """The checkpoint that training starts from."""

    name: str
    """As the user named it."""
    revision: str | None
    """Hub revision, None for a local folder."""
    files: dict[str, str]
    """SHA-256 of each file of weights and configuration, by file name."""


class Provenance(Result):
    """When and where a run was started, and from which weights."""

    created: str
    """Local time of the start, ISO 8601."""
    device: str
    """`cpu` or `cuda`."""
    model: TrainedModel
    """The initial model."""
    environment: Environment
    """Versions, machine and variables."""


class Ending(Result):
    """How training ended."""

    status: Status
    """`complete`: all steps; `collapsed`: the collapse rule; `diverged`: a number is not finite, or no loss scale is
    left."""
    cause: Finding | None
    """Why it ended early; None where it is complete."""
    steps: int
    """Finished steps."""
    last_healthy_checkpoint: str | None
    """The newest checkpoint not later than the best window of rewards; None where none was written."""
    passed: bool
    """The sanity test: the lower 95 % limit of the mean reward over the last window exceeds `pass_above`."""
    first_above_step: int | None
    """Last step of the first window that would have passed; None where none would."""
    clean_reward: float | None
    """Mean reward of the final weights in FP32 without stress, between 0 and 1; None where it was not evaluated."""


class FailedRun(Document):
    """Why a run of a sweep could not be trained; `failed.json`, gone once another attempt starts."""

    KIND: ClassVar[str] = "failure of a run"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe rl sweep --resume"

    why: str
    """The error, with what to do about it."""


class Window(Result):
    """Means over consecutive steps, each step counting once; None where no step has a value."""

    first_step: int
    """The first of them, counted from 0."""
    n_steps: int
    """How many."""
    reward: float | None
    """Mean reward of the sampled policy."""
    entropy: float | None
    """Entropy of the trainer's distribution at a response token, nats."""
    response_length: float | None
    """Tokens of a response."""
    truncated: float | None
    """Fraction of the responses that used up the budget."""
    mean_abs_logprob_diff: float | None
    """Mismatch: mean |log π − log μ| of a token with equal weights on both sides, nats."""
    staleness_mean_abs: float | None
    """Staleness: mean |Δ log-prob| between the trainer's present weights and those that sampled, nats."""
    off_policy_mean_abs: float | None
    """Mismatch and staleness together: mean |Δ log-prob| between the trainer and the engine that sampled, nats."""
    movement_mean_abs: float | None
    """Policy movement: mean |Δ log-prob| that the step's own updates made before a token was used, nats."""
    ess_seq: float | None
    """Effective sample size of the sequences over their number, in (0, 1]; mismatch alone."""
    ess_token: float | None
    """The same of the tokens."""
    off_policy_ess_seq: float | None
    """Effective sample size of the sequences over their number; mismatch and staleness."""
    kl_k3: float | None
    """Sampled estimate k3 of KL(μ‖π), nats per token."""
    grad_norm: float | None
    """Norm of the gradient before clipping."""
    clip_fraction: float | None
    """Fraction of the tokens whose ratio was clipped."""
    mask_fraction: float | None
    """Fraction of the tokens that the correction masked."""
    truncated_fraction: float | None
    """Fraction of the tokens whose importance weight the correction truncated."""
    weights_changed: float | None
    """Fraction of the weights that a step changes in the engine's dtype."""
    sync_gap: float | None
    """Mean |Δ log-prob| at the fixed sequences after a weight sync, nats."""
    router_agreement: float | None = None
    """Fraction of pairs of response token and layer for which engine and trainer choose the same experts; None for a
    dense model, and where routers were not compared."""
    router_flipped_tokens: float | None = None
    """Fraction of response tokens that some layer's router sends to other experts in the trainer."""
    seconds: float | None
    """Time of a step, seconds."""


class SyncCheck(Result):
    """What the checks of the weight syncs showed."""

    checked: bool
    """Whether syncs were checked (`check_sync`)."""
    n_checked: int
    """Finished steps whose sync was accepted by the check."""
    largest_gap: float | None
    """Largest mean |Δ log-prob| at the fixed sequences, nats; None where nothing was checked."""
    at_step: int | None
    """Its step."""


class RunSummary(Result):
    """What the finished steps show."""

    n_steps: int
    """Finished steps."""
    start: Window | None
    """The first steps: the length of the sanity test's window, at most half of the run; None without a step."""
    end: Window | None
    """As many steps at the end."""
    learning: Learning
    """Whether the reward changed from the first to the last steps by more than noise."""
    reward_change: MetricValue
    """Mean reward of the last steps less that of the first, with its 95 % interval (Welch's t over steps)."""
    sync: SyncCheck
    """The weight syncs."""
    seconds: dict[str, float]
    """Time by phase, seconds: `rollout`, `sync`, `forward_backward`, `other`."""
    n_responses: int
    """Responses of all steps."""
    n_truncated: int
    """Those that used up the budget."""
    n_empty: int
    """Those without a token."""
    n_grader_killed: int
    """Those graded 0 because their grader was stopped."""
    n_skipped: int
    """Updates that were skipped because a gradient overflowed in FP16."""


class RlRun(Document):
    """The document of an RL run; written when the run starts and again when it ends."""

    KIND: ClassVar[str] = "RL run"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe rl run"

    config: dict[str, JsonValue]
    """Every setting of the run, see `rl.config.RlConfig`."""
    provenance: Provenance
    """When, where and from what it was started."""
    ending: Ending | None = None
    """How it ended; None while there is something left to do."""
    summary: RunSummary | None = None
    """What its steps show; None until it has ended or was reported."""
    findings: tuple[Finding, ...] = ()
    """Statements about the run, the most important ones first."""
