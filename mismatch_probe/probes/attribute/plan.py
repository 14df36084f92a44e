"""What an attribution would run, before anything has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.engines.attribute.trace import MOST_BYTES
from mismatch_probe.probes.attribute.availability import Context
from mismatch_probe.probes.attribute.knobs import Knob, choose, knobs_of
from mismatch_probe.probes.attribute.options import AttributeOptions
from mismatch_probe.probes.attribute.session import config_of
from mismatch_probe.probes.planning import PassEstimate, estimate, make_plan

# A process's start, seconds, and how much longer one request at a time takes than a batch.
_START, _ALONE = 10.0, 6.0


@dataclass(frozen=True)
class AttributePlan:
    """The comparison's passes, the attribution's processes, and every setting with why it is not among them.

    Attributes:
        device: Where it runs.
        passes: Of the comparison.
        processes: (name, readings, rough seconds) of the attribution.
        knobs: (name, change, why not); no reason where it is measured.
        disk_gib: What traces of layers may take while they are compared.
    """

    device: str
    passes: tuple[PassEstimate, ...]
    processes: tuple[tuple[str, int, float], ...]
    knobs: tuple[tuple[str, str, str], ...]
    disk_gib: float

    @property
    def seconds(self) -> float:
        """Of everything, roughly."""
        return sum(row.seconds for row in self.passes) + sum(seconds for _, _, seconds in self.processes)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def plan_attribution(config: CompareConfig, options: Mapping[str, Any]) -> AttributePlan:
    """Plans; loads nothing.

    Raises:
        ProbeError: The model is not there, no engine is installed, or a knob is not known.
    """
    asked = AttributeOptions(**options)
    plan = make_plan(config_of(config, asked), weights=False)
    rollout, trainer = asked.dtypes
    context = Context(
        device=plan.device,
        gpus=len(devices.gpu_names()),
        rollout_dtype=rollout,
        trainer_dtype=trainer,
        trainer_mode=plan.config.trainer_modes[0] if trainer != "float32" else "cast",
        trainer_layout=plan.config.trainer_layout,
        model=plan.model.config,
        engine={"enforce_eager": plan.device == "cpu" or plan.config.eager},
        attention=plan.config.trainer_attn or "sdpa",
    )
    knobs = knobs_of(context)
    wanted = choose(knobs, asked.knobs)
    rows = estimate(plan)
    reasons = {
        knob.name: knob.why_missing(context)
        or ("" if knob in wanted else "slow: --knobs all, or its name" if knob.slow else "not asked for")
        for knob in knobs
    }
    if asked.layers and not context.engine["enforce_eager"]:
        reasons["rollout-eager"] = ""  # always beside the layers
    chosen = [knob for knob in knobs if not reasons[knob.name]]
    return AttributePlan(
        plan.device,
        tuple(rows),
        tuple(_processes(chosen, rows, asked)),
        tuple((knob.name, knob.change, reasons[knob.name]) for knob in knobs),
        len(asked.layer_dtypes) * MOST_BYTES / devices.GIB if asked.layers else 0.0,
    )


def _processes(chosen: list[Knob], rows: list[PassEstimate], options: AttributeOptions) -> list[tuple[str, int, float]]:
    decode = next(row.seconds for row in rows if row.pass_id.startswith("vllm"))
    score = max(1.0, next(row.seconds for row in rows if row.pass_id.startswith("hf")) - _START)
    same = [knob for knob in chosen if knob.side == "rollout" and knob.arguments is None]
    found = [
        ("vLLM baseline", 2 + len(same), decode * 2 + sum(_ALONE * decode for k in same if k.take == "decode-alone"))
    ]
    found += [(f"vLLM {k.key}", 1, decode) for k in chosen if k.side == "rollout" and k.arguments is not None]
    variants = [knob for knob in chosen if knob.side == "trainer"]
    found.append(("trainer, one change at a time", 2 + len(variants), _START + score * (2 + len(variants))))
    if options.layers:
        found.append(("layers and modules", len(options.layer_dtypes), _START + 6 * score))
    return found
