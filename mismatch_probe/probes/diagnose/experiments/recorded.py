"""Further recorded columns: the engine's own prefill, a second trainer pass."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.metrics.hypotheses import size
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

DECODE = Named(
    "decode-differs-from-prefill",
    "The engine's decode disagrees with its own prefill of the same ids",
    "Update the engine; until then try another attention backend, no prefix caching, eager mode.",
    "rollout",
)
_RANDOM = Named(
    "dropout",
    "Two passes of the trainer disagree with each other as much as with the model",
    "Put the model into eval mode, or set its dropout to 0.",
    "trainer",
)


@experiment("prefill", classes=("decode-prefill", "some-sequences"), forwards=0)
def prefill(subject: Subject) -> Iterator[Hypothesis]:
    """Where the recorded prefill is the model's, and the decode is not, decode is wrong."""
    found = subject.sample.beside.get("rollout_prefill_logprobs")
    if found is not None and subject.off == ("rollout",):
        agrees = size((found - subject.plain)[subject.use])
        before = subject.size("rollout", subject.plain)
        if agrees <= before / 2:
            yield Hypothesis(
                "the engine's prefill", DECODE, found, {"prefill_to_plain": agrees}, only="rollout", like=True
            )


@experiment("second-trainer-pass", classes=("trainer-noise",), forwards=0)
def second(subject: Subject) -> Iterator[Hypothesis]:
    """Where a second pass of the trainer is as far from the first as that is from the model, the trainer is random."""
    found = subject.sample.beside.get("trainer_logprobs_2")
    if found is not None and "trainer" in subject.off:
        apart = size((found - subject.sample.trainer)[subject.use])
        if apart >= subject.size("trainer", subject.plain) / 2:
            yield Hypothesis(
                "the second trainer pass", _RANDOM, found, {"passes_apart": apart}, only="trainer", like=True
            )
