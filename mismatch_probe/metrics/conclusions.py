"""What an attribution may say: where the gap arises, what stands out inside both models by dtype, and whether rounding
makes the gap. All findings follow from these codes and values, so that no two of them can contradict each other.

Rounding shrinks with the unit roundoff: FP32's is 2⁻¹⁶ of BF16's and 2⁻¹³ of FP16's. What is left of a gap when both
sides compute in FP32 is therefore not rounding, whatever the pair's own dtypes are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mismatch_probe.metrics.inside import NOTHING, THRESHOLD, UNIT, Inside, Located, expected, place_of
from mismatch_probe.types import MetricValue

# A contribution to E[d²] below this is not worth a line of its own.
LEAST = 0.02
# Gap in FP32, nats, that its rounding makes at most, most often 1e-7 to 1e-5; beyond it both sides compute different
# things. torch's float32 log-softmax alone, which engines take log-probs from, is some 1e-5 off on a CPU.
FP32_FLOOR = 1e-4
Code = Literal["fault", "not finite", "step", "hidden", "absent", "quiet", "not compared"]
RoundingCode = Literal["cause", "part", "no cause", "fault first", "unknown"]


@dataclass(frozen=True)
class Arises:
    """Which rungs of a ladder make most of the gap, as far as their intervals tell.

    Attributes:
        code: `one` where a rung's interval lies above those of all others; `undecided` where it does not; `estimate`
            where the largest has no interval; `nowhere` where no rung has a contribution.
        rungs: Of `one` and `estimate` that rung, of `undecided` all that may be the largest, the largest estimate
            first.
    """

    code: Literal["one", "undecided", "estimate", "nowhere"]
    rungs: tuple[str, ...] = ()


def arises(contributions: Mapping[str, MetricValue]) -> Arises:
    """Where the gap arises.

    Args:
        contributions: Of each rung to E[d²], in the order of the ladder.
    """
    known = {rung: found.value for rung, found in contributions.items() if found.value is not None}
    if not known:
        return Arises("nowhere")
    first, *others = sorted(known, key=lambda rung: known[rung], reverse=True)
    changed = [rung for rung in others if known[rung] != 0 or contributions[rung].ci_high is not None]
    if not changed:
        return Arises("one", (first,))
    low = contributions[first].ci_low
    if low is None:
        return Arises("estimate", (first,))
    rivals = [rung for rung in changed if _highest(contributions[rung]) >= low]
    return Arises("undecided", (first, *rivals)) if rivals else Arises("one", (first,))


def _highest(value: MetricValue) -> float:
    return math.inf if value.ci_high is None else value.ci_high


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

    code: Code
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


@dataclass(frozen=True)
class Left:
    """What FP32 on both sides leaves of a gap.

    Attributes:
        fraction: Of E[d²]; None of a pair in FP32, or where it was not measured.
        rms: Of what is left, nats.
    """

    fraction: float | None = None
    rms: float | None = None


@dataclass(frozen=True)
class Rounding:
    """Whether rounding makes the gap.

    Attributes:
        code: `cause` where it does; `part` where FP32 on both sides leaves a part that is not rounding; `no cause`
            where it leaves all; `fault first` where FP32 leaves nothing, and a fault that it does not show stands out
            in the pair's own dtypes; `unknown` where FP32 was not looked into, or may have flipped a router.
        left: The fraction of E[d²] that FP32 on both sides leaves, None where it was not measured.
        elsewhere: Whether FP32 leaves a gap although nothing stands out inside of the models.
    """

    code: RoundingCode
    left: float | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Conclusions:
    """All that is concluded from both models' insides.

    Attributes:
        dtypes: By dtype.
        rounding: Whether it makes the gap.
    """

    dtypes: Mapping[str, Conclusion]
    rounding: Rounding


def conclude(insides: Mapping[str, Inside], pair: Sequence[str], left: Left = Left(), *, routers: bool) -> Conclusions:
    """Decides.

    Args:
        insides: By dtype.
        pair: Dtypes of the rollout and of the trainer.
        left: What FP32 on both sides leaves of the gap.
        routers: Whether the model sends tokens to experts.
    """
    own = {dtype: _of_dtype(inside, routers) for dtype, inside in insides.items()}
    looked = [dtype for dtype, found in own.items() if found.code not in ("not compared", "not finite")]
    widest = min(looked, key=lambda dtype: UNIT[dtype], default="")
    found = dict(own)
    if widest and own[widest].stands_out:
        for dtype in looked:
            if own[dtype].code == "quiet" and UNIT[dtype] > UNIT[widest]:
                found[dtype] = _unseen(insides[dtype], dtype, insides[widest], widest, own[widest])
    return Conclusions(found, _rounding(found, insides.get("float32", Inside()), set(pair), left, routers=routers))


def _of_dtype(inside: Inside, routers: bool) -> Conclusion:
    """By what this dtype shows alone."""
    located = inside.located
    if located is None or not inside.tensors:
        return Conclusion("not compared")
    if located.verdict == "not finite":
        return Conclusion("not finite", located, located.score)
    if located.verdict != NOTHING.verdict:
        return Conclusion("fault", located, located.score)
    steps = {row.layer: row.score for row in inside.layers if row.score > THRESHOLD}
    if not steps:
        return Conclusion("quiet", located, located.score)
    ends = {tensor.layer for tensor in inside.tensors if tensor.kind == "end"}
    return Conclusion(
        "step", NOTHING, max(steps.values()), tuple(sorted(steps)), ends=set(steps) <= ends, routers=routers
    )


def _unseen(inside: Inside, dtype: str, wide: Inside, widest: str, shown: Conclusion) -> Conclusion:
    """Of a dtype in which nothing stands out, though it does in the one with the most bits."""
    there, here = _distances(wide, widest, shown), _distances(inside, dtype, shown)
    # Half of what would stand out is left for the noise of both measurements.
    absent = any(there[key][0] > 2 * THRESHOLD * here[key][1] for key in there.keys() & here.keys())
    largest = (inside.located or NOTHING).score
    return Conclusion("absent" if absent else "hidden", shown.located, largest, shown.layers, seen_in=widest)


def _distances(inside: Inside, dtype: str, shown: Conclusion) -> dict[int | str, tuple[float, float]]:
    """How far apart the sides are in what a conclusion is about, and how far rounding lets them be."""
    found: dict[int | str, tuple[float, float]] = {}
    if shown.code == "step":
        for row in inside.layers:
            if row.layer in shown.layers and row.step is not None and row.step_expected is not None:
                found[row.layer] = (row.step, row.step_expected)
        return found
    about = shown.located
    for tensor in inside.tensors:
        name = tensor.name if about.verdict != "everywhere" else place_of(tensor.name, tensor.kind)
        if tensor.apart is None or tensor.trainer_error is None or (name, tensor.kind) != (about.name, about.kind):
            continue
        found[tensor.name] = (tensor.apart, float(expected(np.array([tensor.trainer_error]), dtype)[0]))
    return found


def _rounding(found: Mapping[str, Conclusion], wide: Inside, pair: set[str], left: Left, *, routers: bool) -> Rounding:
    # A token on the edge between two experts goes elsewhere in FP32 as well.
    shown = found.get("float32", Conclusion("not compared"))
    end = wide.end_score
    if pair == {"float32"}:
        if shown.is_fault:
            return Rounding("no cause")
        if end is None or (routers and end > THRESHOLD):
            return Rounding("unknown")
        return Rounding("cause") if end <= THRESHOLD else Rounding("no cause", elsewhere=shown.code == "quiet")
    if left.fraction is None:
        return Rounding("unknown")
    more = (left.rms or 0.0) > FP32_FLOOR or shown.is_fault or (end or 0.0) > THRESHOLD
    if left.fraction >= LEAST and more and routers and not shown.is_fault:
        return Rounding("unknown", left.fraction)
    if left.fraction >= LEAST and more:
        return Rounding(
            "part" if left.fraction < 1 - LEAST else "no cause", left.fraction, elsewhere=shown.code == "quiet"
        )
    if any(found[dtype].is_fault and found[dtype].place != shown.place for dtype in pair if dtype in found):
        return Rounding("fault first", left.fraction)
    return Rounding("cause", left.fraction)
