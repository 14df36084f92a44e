"""The name of a pass: its parts, and the one place where they become text and are read from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from mismatch_probe.types import DTYPES, TrainerDtype, TrainerMode

PassKind = Literal["decode", "replay", "score"]
RecordedMode = Literal["recorded", "prefill", "ref", "current"]
PassMode = TrainerMode | RecordedMode | Literal[""]


@dataclass(frozen=True)
class PassId:
    """One run of an engine over sequences. Tables and files have it as text.

    Attributes:
        engine: Its name, or `recorded` for what a file brought.
        dtype: In which it ran; `recorded` likewise.
        kind: `decode` samples responses, `replay` decodes given ids again, `score` is a trainer's forward pass.
        mode: Of a trainer pass `cast` or `autocast`; what else a dump brought beside a rollout and a trainer: `prefill`
            (the rollout engine's own prefill), `ref` (the reference model) or `current` (the trainer's update pass).
        variant: `null` for a second run of some tokens of a pass, which shows the engine's self-noise.
    """

    engine: str
    dtype: TrainerDtype | Literal["recorded"]
    kind: PassKind
    mode: PassMode = ""
    variant: Literal["", "null"] = ""

    @classmethod
    def rollout(cls, engine: str, dtype: TrainerDtype, kind: PassKind = "decode") -> PassId:
        """A row of the matrix."""
        return cls(engine, dtype, kind)

    @classmethod
    def trainer(cls, engine: str, dtype: TrainerDtype, mode: TrainerMode = "cast") -> PassId:
        """A column of the matrix, or the reference beside it."""
        return cls(engine, dtype, "score", mode)

    @property
    def recorded(self) -> bool:
        """Whether a file brought it, so that no engine runs it."""
        return self.engine == "recorded"

    @property
    def side(self) -> Literal["rollout", "trainer"]:
        """Whose log-probs it holds."""
        return "trainer" if self.kind == "score" else "rollout"

    @property
    def repeat(self) -> PassId:
        """The pass that runs some tokens of this one a second time."""
        return replace(self, variant="null")

    def __str__(self) -> str:
        own = self.side if self.mode in ("", "recorded") else self.mode
        name = f"recorded-{own}" if self.recorded else f"{self.engine}-{self.dtype}-{self.mode or self.kind}"
        return f"{name}-{self.variant}" if self.variant else name

    @classmethod
    def parse(cls, text: str) -> PassId:
        """The pass whose text this is.

        Raises:
            ValueError: No pass has it.
        """
        name = text.removesuffix("-null")
        *engine, dtype, last = ["", "", *name.split("-")]
        if last in get_args(TrainerMode):
            found = cls("-".join(engine[2:]), dtype, "score", last)  # type: ignore[arg-type]
        elif name in _RECORDED:
            found = _RECORDED[name]
        else:
            found = cls("-".join(engine[2:]), dtype, last)  # type: ignore[arg-type]
        found = found if name == text else found.repeat
        if (
            str(found) != text
            or found.kind not in get_args(PassKind)
            or found.dtype not in (*DTYPES, "float64", "recorded")
        ):
            raise ValueError(f"{text!r} is not the id of a pass")
        return found


RECORDED_ROLLOUT = PassId("recorded", "recorded", "decode")
RECORDED_TRAINER = PassId("recorded", "recorded", "score", "recorded")
RECORDED_PREFILL = PassId("recorded", "recorded", "replay", "prefill")
RECORDED_REF = PassId("recorded", "recorded", "score", "ref")
RECORDED_CURRENT = PassId("recorded", "recorded", "score", "current")
_RECORDED = {
    str(one): one for one in (RECORDED_ROLLOUT, RECORDED_TRAINER, RECORDED_PREFILL, RECORDED_REF, RECORDED_CURRENT)
}
