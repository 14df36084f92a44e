"""Other ids or another layout: a begin-of-sequence token, packed rows that leak, padding that positions count."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

_BOS = Named(
    "missing-bos",
    "The sides see another begin of the prompt",
    "Encode each prompt once, and hand its ids to both sides; set add_special_tokens alike.",
)
_LEAK = Named(
    "packing-leak",
    "Packed sequences see those before them",
    "Give the trainer position ids that start again at each sequence, or cumulative lengths, and an attention that "
    "uses them.",
)
_PADDING = Named(
    "left-padding-positions",
    "Position ids count the padding on the left",
    "Give position ids made from the attention mask.",
)
_ATTENDED = Named(
    "left-padding-attended",
    "Attention sees the padding on the left",
    "Give the trainer the attention mask of its batch.",
)


@experiment("begin-of-sequence", classes=("prompts-differ",), forwards=3)
def begin(subject: Subject) -> Iterator[Hypothesis]:
    """Prompts with one begin-of-sequence token more, or with one token less."""
    first = {next(iter(prompt)) for prompt, _ in subject.sample.ids}
    changes = []
    if subject.bos is not None:
        changes.append(ForwardChange("with a begin-of-sequence token in front", before=(subject.bos,)))
    if len(first) == 1:
        changes.append(ForwardChange("without the first token", dropped=1))
    return subject.forward("model", changes, lambda _: _BOS)


@experiment("packing", classes=("packing",), forwards=2)
def packing(subject: Subject) -> Iterator[Hypothesis]:
    """Rows packed as the dump says, without a mask between sequences."""
    changes = [
        ForwardChange("packed, attention not reset", layout="packed-leak", groups=_groups(subject)),
        ForwardChange("packed, attention and positions not reset", layout="packed-joined", groups=_groups(subject)),
    ]
    return subject.whole("model", changes if subject.sample.packs else [], lambda _: _LEAK)


def _groups(subject: Subject) -> tuple[tuple[int, ...], ...]:
    packed = {i for pack in subject.sample.packs for i in pack}
    return (*subject.sample.packs, *((i,) for i in range(len(subject.sample.requests)) if i not in packed))


@experiment("left-padding", classes=("padding",), forwards=8)
def padding(subject: Subject) -> Iterator[Hypothesis]:
    """Neighbours of the dump in one batch, padded on the left, positions counted through the padding."""
    changes = []
    for layout, about in (("left-unnumbered", "positions count"), ("left-attended", "attention sees")):
        for rows in (8, 4, 16, 32):
            blocks: dict[int, list[int]] = {}
            for index, place in enumerate(subject.sample.places):
                blocks.setdefault(place // rows, []).append(index)
            groups = tuple(tuple(block) for block in blocks.values())
            changes.append(ForwardChange(f"batches of {rows}, {about} padding", layout=layout, groups=groups))
    return subject.whole("model", changes, lambda change: _PADDING if change.layout == "left-unnumbered" else _ATTENDED)
