"""One side's numbers are of another token, of another place, or of a coarser softmax."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mismatch_probe.probes.diagnose.evidence import Floats, Ints
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

_TOP = Named(
    "top1-instead-of-sampled",
    "The log-prob of the likeliest token is recorded in place of the sampled one's",
    "Look the sampled id up in the returned log-probs; do not take the first entry.",
)
_SHIFTED = Named(
    "shift-by-one",
    "Log-probs belong to a token beside theirs",
    "Logits at a position predict the next token: shift labels by one, once, and each sequence of a pack for itself.",
)
_PACKED = Named("packed-labels-shifted", "Labels of packed rows are shifted together", _SHIFTED.fix)
_LOW = Named(
    "softmax-16-bit",
    "The log-softmax runs in 16 bit",
    "Upcast logits to FP32 before the log-softmax, or keep the LM head in FP32.",
)


@experiment("top1", classes=("top1-logprobs",), forwards=0)
def top_one(subject: Subject) -> Iterator[Hypothesis]:
    """The likeliest token in place of the sampled one."""
    yield Hypothesis("the likeliest token's log-prob", _TOP, subject.rows.top_one())


@experiment("shift", classes=("shift",), forwards=0)
def shift(subject: Subject) -> Iterator[Hypothesis]:
    """The plain column shifted within sequences: all, those of a pack after its first, or more in each of them."""
    sample = subject.sample
    place = np.zeros(len(sample.requests), np.int64)  # in the packed row
    for pack in sample.packs:
        place[list(pack)] = np.arange(len(pack))
    of_token = place[sample.sequence]
    packed = {
        "from the second sequence of a packed row on": np.minimum(of_token, 1),
        "more with each sequence": of_token,
    }
    for by in (-2, -1, 1, 2):
        column = shifted(subject.plain, sample.sequence, by)
        yield Hypothesis(f"log-probs of the token {by:+d}", _SHIFTED, column, {"by": float(by)})
        for about, times in packed.items() if of_token.any() else ():
            column = shifted(subject.plain, sample.sequence, by * times)
            yield Hypothesis(f"log-probs of the token {by:+d} {about}", _PACKED, column, {"by": float(by)})


def shifted(values: Floats, sequence: Ints, by: Ints | int) -> Floats:
    """`[N]` values of the token `by`, or `[N]`, places later in the sequence; of its last or first one if none is."""
    index = np.arange(len(values))
    start = np.searchsorted(sequence, sequence, side="left")
    end = np.searchsorted(sequence, sequence, side="right") - 1
    return np.asarray(values[np.clip(index + by, start, end)])


@experiment("softmax-16-bit", classes=("coarse-logprobs",), forwards=0)
def low(subject: Subject) -> Iterator[Hypothesis]:
    """A softmax in BF16 or FP16, or logits less their normaliser in it."""
    for name, column in subject.rows.low.items():
        kind, _, dtype = name.partition("_")
        yield Hypothesis(f"log-softmax {kind} in {dtype}", _LOW, column, {"dtype": dtype})
