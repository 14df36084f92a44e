"""The document of `diagnose`: which classes of faults explain a gap, how sure that is, and what is left."""

from __future__ import annotations

from typing import ClassVar, Literal

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.dump import Source
from mismatch_probe.results.finding import Finding

Outcome = Literal["fault", "rounding", "length-product", "cannot-tell"]


class ShownToken(Result):
    """A token that shows a fault."""

    place: str
    """File, row from 1 and index in the response from 0, e.g. `"dump.jsonl:12[40]"`."""
    token_id: int
    """Its id."""
    rollout_logprob: float | None
    """b, nats; None where it is not finite."""
    trainer_logprob: float | None
    """a, nats; None where it is not finite."""


class Rival(Result):
    """A class that could explain the gap as well, or in part."""

    name: str
    """The class."""
    gain: float
    """What it gains alone, nats per token."""


class DiagnosedClass(Result):
    """A class of faults that was found."""

    name: str
    """The class, in kebab case."""
    title: str
    """What is wrong, a sentence without its stop."""
    kind: Literal["labels", "rows", "weights", "forward"]
    """`labels`: the number means something else; `rows`: rows do not line up; `weights`: other weights; `forward`: the
    same weights, another forward pass."""
    confidence: float
    """In [0, 1]: how often such an answer was right on recorded runs with a known fault, of which a quarter was of a
    kind that no signature knows."""
    gain: float
    """Log-likelihood of held-out prompts that it gains over what was explained before, nats per token."""
    gain_units: float
    """The gain in standard errors, over prompts."""
    parameters: dict[str, float | str]
    """What was fitted, by name."""
    n_shown: int
    """Tokens that show it."""
    share_shown: float
    """Their share of all tokens."""
    gap_before: float
    """Mean |d| of these tokens, capped at 3 nats a token, before it is explained."""
    gap_after: float | None
    """The same of what is left; None where log-probs of the tokens say nothing."""
    tokens: tuple[ShownToken, ...]
    """A few of the tokens that show it."""
    causes: tuple[str, ...]
    """Causes that make it; experiments tell them apart."""
    rivals: tuple[Rival, ...]
    """Other classes that gained something before this one was explained, the best first."""
    confirm: str
    """What would settle the cause."""
    fix: str
    """What to do."""


class Remainder(Result):
    """What is left once everything that was found is explained."""

    rms: float
    """RMS of what is left, capped at 3 nats a token."""
    mean_abs: float
    """Mean of its absolute values, capped alike."""
    mean: float
    """Mean of what is left."""
    degrees: float
    """Degrees of freedom of Student's t that fits it: small for heavy tails."""
    mean_ratio: float
    """Mean of exp(what is left), capped at 3 nats a token: 1 where b is the distribution that sampled."""
    mean_inverse_ratio: float
    """Mean of exp(−what is left): 1 where a is."""
    sequence_spread: float
    """Standard deviation over sequences of their sums: above 1 the product of ratios is far from 1."""
    baseline: float | None
    """Mean |d| that an audit measured on the model's own passes; None where none was named."""


Side = Literal["rollout", "trainer"]


class SideSizes(Result):
    """How far one side's recorded log-probs are from a column: means of absolute values, cut at 3 nats a token."""

    rollout: float
    """Of the rollout's, nats a token."""
    trainer: float
    """Of the trainer's."""


class Experiment(Result):
    """A column of log-probs of the recorded ids under one hypothesis."""

    name: str
    """The experiment, in kebab case."""
    hypothesis: str
    """What was supposed, in a few words."""
    parameters: dict[str, float | str]
    """What was fitted or chosen, by name."""
    forwards: int
    """Forward passes that it took beside those before; 0 where the rows of logits were at hand."""
    seconds: float
    """What they took."""
    sizes: SideSizes | None
    """What is left of each side to its column; None where there is none."""
    explains: tuple[Side, ...]
    """Sides that it reproduces, and the plain pass does not."""
    why: str
    """Why it has no column; empty where it has one."""


class NotRun(Result):
    """An experiment that was not needed, or that something is missing for."""

    name: str
    """The experiment."""
    forwards: int
    """Forward passes that it would cost."""
    needs: str
    """What is missing: an option; empty where going on alone would do."""


class Cause(Result):
    """What makes the gap, found by experiment."""

    name: str
    """The cause, in kebab case."""
    side: Side | None
    """The side at fault; None where it is not one side's."""
    title: str
    """What is wrong, a sentence without its stop."""
    fix: str
    """What to do."""
    experiment: str
    """The experiment that settled it."""
    parameters: dict[str, float | str]
    """What was fitted, by name."""
    before: float
    """Size of what the plain pass leaves of the side, nats a token, over the tokens that are judged."""
    after: float
    """The same of what the hypothesis leaves."""
    floor: float
    """Size that rounding makes."""
    gain: float
    """Log-likelihood that the hypothesis gains over the plain pass, nats a token."""
    as_well: tuple[str, ...]
    """Causes whose columns are the same within rounding."""


Settled = Literal["cause", "numerics", "side", "neither-side"]


class Active(Result):
    """What experiments with the model found."""

    model: str
    """The model that ids were scored with."""
    dtype: str
    """Dtype of these passes."""
    n_tokens: int
    """Tokens that they are of."""
    n_sequences: int
    """Their sequences."""
    n_judged: int
    """Tokens that sizes are of: those that show what the table shows, at steps whose weights are the model's."""
    floor: float
    """Size that rounding makes: of a 16-bit pass to the plain pass, or of the side that agrees with it if larger."""
    floor_dtype: str
    """Dtype of the 16-bit pass."""
    plain: SideSizes
    """What the plain pass leaves of each side."""
    shared: str
    """What both sides have and the plain pass has not, such as a truncation; empty for nothing."""
    ruled_out: tuple[str, ...]
    """Classes of the table that are none, because the plain pass reproduces both sides."""
    settled: Settled
    """`cause`: one explains the gap; `numerics`: the plain pass reproduces both sides; `side`: one side is at fault for
    a cause that was not found; `neither-side`: neither is what this model gives."""
    side: Side | None
    """The side at fault, where it is known."""
    cause: Cause | None
    """What explains the gap."""
    experiments: tuple[Experiment, ...]
    """What was run, in order."""
    left: tuple[NotRun, ...]
    """What was not."""
    seconds: float
    """What all of it took."""


class Diagnosis(Document):
    """The document of a diagnosis."""

    KIND: ClassVar[str] = "diagnosis"
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "mismatch-probe diagnose DUMP --out {folder}"

    source: Source
    """The dump."""
    n_tokens: int
    """Tokens that were looked at."""
    n_sequences: int
    """Their sequences."""
    n_prompts: int
    """Their prompts."""
    outcome: Outcome
    """`fault`: at least one class was found, or a cause by experiment; `rounding`: symmetric noise; `length-product`:
    healthy per token, the product over a response is not; `cannot-tell`: something is off that no class explains, or
    noise that is larger than rounding usually is."""
    classes: tuple[DiagnosedClass, ...]
    """What was found, in the order in which it explains most."""
    remainder: Remainder
    """What is left."""
    active: Active | None
    """What experiments with the model found; None where no model was named."""
    findings: tuple[Finding, ...]
    """What limits the answer."""
