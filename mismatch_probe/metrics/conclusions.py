"""What both models' insides come to: one decision by dtype, and one on rounding. All that is said of layers, modules
and rounding is made of these codes and values, so that no two sentences can contradict each other.

Rounding shrinks with the unit roundoff: FP32's is 2⁻¹⁶ of BF16's and 2⁻¹³ of FP16's. What is left of a gap when both
sides compute in FP32 is therefore not rounding, whatever the pair's own dtypes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mismatch_probe.metrics.inside import THRESHOLD, UNIT, Located, expected, place_of

# A share of E[d²] below this is not worth a line of its own.
LEAST = 0.02
# Gap in FP32, nats, that its rounding makes at most, most often 1e-7 to 1e-5; beyond it both sides compute different
# things. torch's float32 log-softmax alone, which engines take log-probs from, is some 1e-5 off on a CPU.
FP32_FLOOR = 1e-4
NOTHING = Located("no single layer", "", "", None, 0.0)


@dataclass(frozen=True)
class Conclusion:
    """What a dtype shows.

    Attributes:
        code: `fault` where a module stands out, or what lies between modules; `not finite` where a tensor is not;
            `step` where a layer's own step stands out and nothing that was compared in it does; `hidden` where nothing
            does, and what `seen_in` shows is no more than this dtype rounds; `absent` where it would be more, and is
            not there; `quiet` where nothing stands out here, and nothing that hides here does elsewhere; `not
            compared`.
        located: What stands out; of `hidden` and `absent` what does in `seen_in`; of `quiet` the largest score.
        score: The largest of a module, of `step` that of the step.
        layers: Of `step`, all whose step stands out.
        ends: Of `step`, whether what those layers hand on was compared as well.
        routers: Of `step`, whether the model sends tokens to experts: one flip makes it stand out, in any dtype.
        seen_in: The dtype with more bits that shows what is not to be seen here.
    """

    code: str
    located: Located = NOTHING
    score: float = 0.0
    layers: tuple[int, ...] = ()
    ends: bool = False
    routers: bool = False
    seen_in: str = ""

    @property
    def stands_out(self) -> bool:
        """Whether something is beyond the threshold."""
        return self.code in ("fault", "step")

    @property
    def is_fault(self) -> bool:
        """Whether more than rounding is there: a step may hold what adds up where all that is in it was compared."""
        return self.code in ("fault", "not finite") or (self.code == "step" and not self.ends and not self.routers)

    @property
    def place(self) -> tuple[str, str, str]:
        """What stands out, whatever the dtype."""
        return self.located.verdict, self.located.kind, self.located.name

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        lists = {"located": self.located.as_dict(), "layers": list(self.layers)}
        return {**vars(self), **lists, "fault": self.is_fault}


@dataclass(frozen=True)
class Left:
    """What FP32 on both sides leaves of a gap.

    Attributes:
        share: Of E[d²]; None of a pair in FP32, or where it was not measured.
        rms: Of what is left, nats.
    """

    share: float | None = None
    rms: float | None = None


@dataclass(frozen=True)
class Rounding:
    """Whether rounding makes the gap.

    Attributes:
        code: `cause` where it does; `part` where FP32 on both sides leaves a share that is not rounding; `no cause`
            where it leaves all; `fault first` where FP32 leaves nothing, and a fault that it does not show stands out
            in the pair's own dtypes; `unknown` where FP32 was not looked into, or may have flipped a router.
        left: The share of E[d²] that FP32 on both sides leaves, None where it was not measured.
        elsewhere: Whether FP32 leaves a gap although nothing stands out inside of the models.
    """

    code: str
    left: float | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Conclusions:
    """All of them.

    Attributes:
        dtypes: By dtype.
        rounding: Whether it makes the gap.
    """

    dtypes: Mapping[str, Conclusion]
    rounding: Rounding

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "dtypes": {name: found.as_dict() for name, found in self.dtypes.items()},
            "rounding": {**vars(self.rounding)},
        }


def conclude(
    rows: Mapping[str, Mapping[str, Any]], pair: Sequence[str], left: Left = Left(), *, routers: bool
) -> Conclusions:
    """Decides.

    Args:
        rows: By dtype, `layers` with their steps, `modules`, `located`, and `end_score`, see `attribution.json`;
            nothing was compared where `located` is None.
        pair: Dtypes of the rollout and of the trainer.
        left: What FP32 on both sides leaves of the gap.
        routers: Whether the model sends tokens to experts.
    """
    own = {dtype: _of_dtype(row, routers) for dtype, row in rows.items()}
    looked = [dtype for dtype, found in own.items() if found.code not in ("not compared", "not finite")]
    widest = min(looked, key=lambda dtype: UNIT[dtype], default="")
    found = dict(own)
    if widest and own[widest].stands_out:
        for dtype in looked:
            if own[dtype].code == "quiet" and UNIT[dtype] > UNIT[widest]:
                found[dtype] = _unseen(rows[dtype], dtype, rows[widest], widest, own[widest])
    return Conclusions(found, _rounding(found, rows.get("float32", {}), set(pair), left, routers=routers))


def _of_dtype(row: Mapping[str, Any], routers: bool) -> Conclusion:
    """By what this dtype shows alone."""
    if row["located"] is None or not row["modules"]:
        return Conclusion("not compared")
    located = Located(**row["located"])
    if located.verdict == "not finite":
        return Conclusion("not finite", located, located.score)
    if located.verdict != NOTHING.verdict:
        return Conclusion("fault", located, located.score)
    steps = {layer["layer"]: layer["score"] for layer in row["layers"] if layer["score"] > THRESHOLD}
    if not steps:
        return Conclusion("quiet", located, located.score)
    ends = {record["layer"] for record in row["modules"] if record["kind"] == "end"}
    return Conclusion(
        "step", NOTHING, max(steps.values()), tuple(sorted(steps)), ends=set(steps) <= ends, routers=routers
    )


def _unseen(row: Mapping[str, Any], dtype: str, wide: Mapping[str, Any], widest: str, shown: Conclusion) -> Conclusion:
    """Of a dtype in which nothing stands out, though it does in the one with the most bits."""
    there, here = _distances(wide, widest, shown), _distances(row, dtype, shown)
    # Half of what would stand out is left for the noise of both measurements.
    absent = any(there[key][0] > 2 * THRESHOLD * here[key][1] for key in there.keys() & here.keys())
    largest = Located(**row["located"]).score
    return Conclusion("absent" if absent else "hidden", shown.located, largest, shown.layers, seen_in=widest)


def _distances(row: Mapping[str, Any], dtype: str, shown: Conclusion) -> dict[Any, tuple[float, float]]:
    """How far apart the sides are in what a conclusion is about, and how far rounding lets them be."""
    if shown.code == "step":
        steps = (layer for layer in row["layers"] if layer["layer"] in shown.layers)
        return {
            s["layer"]: (s["step"], s["step_expected"]) for s in steps if None not in (s["step"], s["step_expected"])
        }
    about, found = shown.located, {}
    for record in row["modules"]:
        name = record["name"] if about.verdict != "everywhere" else place_of(record["name"], record["kind"])
        known = None not in (record["apart"], record["trainer_error"])
        if known and (name, record["kind"]) == (about.name, about.kind):
            limit = float(expected(np.array([record["trainer_error"]]), dtype)[0])
            found[record["name"]] = (float(record["apart"]), limit)
    return found


def _rounding(
    found: Mapping[str, Conclusion], wide: Mapping[str, Any], pair: set[str], left: Left, *, routers: bool
) -> Rounding:
    # A token on the edge between two experts goes elsewhere in FP32 as well.
    shown = found.get("float32", Conclusion("not compared"))
    end = wide.get("end_score")
    if pair == {"float32"}:
        if shown.is_fault:
            return Rounding("no cause")
        if end is None or (routers and end > THRESHOLD):
            return Rounding("unknown")
        return Rounding("cause") if end <= THRESHOLD else Rounding("no cause", elsewhere=shown.code == "quiet")
    if left.share is None:
        return Rounding("unknown")
    more = (left.rms or 0.0) > FP32_FLOOR or shown.is_fault or (end or 0.0) > THRESHOLD
    if left.share >= LEAST and more and routers and not shown.is_fault:
        return Rounding("unknown", left.share)
    if left.share >= LEAST and more:
        return Rounding("part" if left.share < 1 - LEAST else "no cause", left.share, elsewhere=shown.code == "quiet")
    if any(found[dtype].is_fault and found[dtype].place != shown.place for dtype in pair if dtype in found):
        return Rounding("fault first", left.share)
    return Rounding("cause", left.share)
