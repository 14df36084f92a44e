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
    """In [0, 1]; grows with the gain and with its lead over rivals. It orders answers and is not calibrated."""
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
    """`fault`: at least one class was found; `rounding`: symmetric noise; `length-product`: healthy per token, the
    product over a response is not; `cannot-tell`: something is off that no class explains, or noise that is larger than
    rounding usually is."""
    classes: tuple[DiagnosedClass, ...]
    """What was found, in the order in which it explains most."""
    remainder: Remainder
    """What is left."""
    findings: tuple[Finding, ...]
    """What limits the answer."""
