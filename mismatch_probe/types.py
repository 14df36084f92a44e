"""Plain data that travels between layers. Nothing here imports more than the standard library and numpy.

Shape legend: `N` response tokens of a pair, `S` sequences, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
TrainerDtype = Dtype | Literal["float64"]
# Engines where none is named.
ROLLOUT_ENGINE, TRAINER_ENGINE = "vllm", "hf"
TrainerMode = Literal["cast", "autocast"]
TrainerLayout = Literal["single", "padded", "packed"]
SequenceSource = Literal["own", "shared"]
ReferenceDtype = Literal["float32", "float64"]
# What `metrics.exact.divergences` gives, and `exact.parquet` holds, of a position.
DIVERGENCES = (
    "kl",
    "kl_reverse",
    "js",
    "tv",
    "flip",
    "entropy_rollout",
    "entropy_trainer",
    "chi2",
    "k1_square",
    "k2_square",
    "k3_square",
)
# Length of a position's count sketch of μ − π, `metrics.drift`.
DRIFT_BUCKETS = 128


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it: plain `text`, or chat `messages`, never both.

    Attributes:
        prompt_id: Unique within a run, e.g. `"math-017"` or `"line-3"`.
        text: Plain text, encoded as it stands.
        messages: Chat messages (`{"role": …, "content": …}`), rendered by the model's chat template.
        category: Free label, e.g. `"mathematics"`.
        answer: Reference answer where one can be checked.
    """

    prompt_id: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    category: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt encoded once; from here on engines see ids only."""

    prompt_id: str
    token_ids: list[int]


@dataclass(frozen=True)
class Sampling:
    """How the rollout engine samples. There is no truncation or penalty: exp(b) is the sampling distribution."""

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample, or to decode again.

    Attributes:
        sequence_id: Unique within a run.
        prompt_token_ids: The prompt.
        seed: This request's own, so ids do not depend on the batch's order.
        forced_token_ids: The response to decode again, token by token; empty where one is to be sampled.
        logit_noise: Standard deviation of injected noise on every logit (an RL run's stress); the engine's
            job must allow for it.
        race_from: Position in the whole response that this one begins at: each token is then the one that
            `engines.logits.winner` draws there with the request's seed. None where the engine draws for itself. The
            engine's job must allow for it as for noise.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    seed: int
    forced_token_ids: Sequence[int] = ()
    logit_noise: float = 0.0
    race_from: int | None = None


@dataclass(frozen=True)
class Rollout:
    """A sampled response with the engine's own log-probs, `response_token_ids` and `logprobs` of equal length.

    `routes` are the experts of its tokens and its prompt's, see `attribute.trace.Routes`, where they were kept; unknown
    for the last token, which no step has read.
    """

    sequence_id: int
    response_token_ids: list[int] | NDArray[np.int32]
    logprobs: list[float] | NDArray[np.float32]
    finish_reason: str
    text: str = ""
    routes: NDArray[np.int16] | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """A sequence whose response tokens are to be scored."""

    sequence_id: int
    prompt_token_ids: list[int]
    response_token_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True)
class Score:
    """Log-probs of a sequence's response tokens.

    Attributes:
        sequence_id: The sequence.
        logprobs: Nats, one per token; float64 from a float64 forward.
        entropy: Of the distribution at each token, nats.
        rank: How many tokens of the vocabulary are likelier, at each token.
        exact: Columns of equal length, a row per position and rollout pass: `source`, `sequence_id`, `position`,
            `weight`, `stands_for`, what `metrics.exact.divergences` gives and, if the engine gives them, the columns of
            `metrics.drift.drift_columns`.
    """

    sequence_id: int
    logprobs: list[float] | NDArray[np.floating[Any]]
    entropy: NDArray[np.floating[Any]] | None = None
    rank: NDArray[np.int32] | None = None
    exact: Mapping[str, NDArray[Any]] | None = None


@dataclass(frozen=True)
class MetricValue:
    """A metric with its 95 % interval.

    Attributes:
        value: The estimate, or None when the metric does not apply (then `why` says so).
        ci_low: Lower limit, None for maxima and for what has no interval.
        ci_high: Upper limit.
        why: Why there is no value, or what limits it; empty when nothing does.
    """

    value: float | None
    ci_low: float | None = None
    ci_high: float | None = None
    why: str = ""


@dataclass(frozen=True)
class PairArrays:
    """Paired log-probs of the same tokens under rollout policy μ and trainer policy π.

    Attributes:
        rollout_logprob: `[N]` float64, b_t = log μ(y_t), nats.
        trainer_logprob: `[N]` float64, a_t = log π(y_t), nats.
        sequence: `[N]` int64, index of the token's sequence, 0 … S−1, non-decreasing.
        position: `[N]` int64, index of the token in its response, from 0.
        prompt: `[S]` int64, index of the sequence's prompt, 0 … P−1: the unit of every interval.
        prompt_ids: `[P]` names of the prompts, so that two pairs can be matched prompt by prompt.
        on_policy: True when exp(b) is the distribution that these tokens were sampled from.
        off_policy_why: The reason when `on_policy` is False.
        columns: Further properties of the tokens, `[N]` each, by name, e.g. `"entropy"`.
        usable: `[N]` which tokens count, all of them finite on both sides; None where every finite one does.

    A pair can be a chunk of a larger one: `sequence`, `prompt` and `prompt_ids` are then those of the whole, and the
    chunk holds all tokens of the sequences that it has tokens of.
    """

    rollout_logprob: NDArray[np.float64]
    trainer_logprob: NDArray[np.float64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    prompt: NDArray[np.int64]
    prompt_ids: tuple[str, ...] = field(default=())
    on_policy: bool = True
    off_policy_why: str = ""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    usable: NDArray[np.bool_] | None = None
