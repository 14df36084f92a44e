"""What an attribution would run, before anything has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mismatch_probe.config import AttributeOptions, CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.engines.attribute.trace import MOST_BYTES
from mismatch_probe.probes.attribute.availability import Context
from mismatch_probe.probes.attribute.session import config_of
from mismatch_probe.probes.attribute.settings import Setting, choose, settings_of
from mismatch_probe.probes.planning import PassEstimate, estimate, make_plan
from mismatch_probe.results.attribution import AttributionPlan, PlannedProcess, PlannedSetting

# A process's start, seconds, and how much longer one request at a time takes than a batch.
_START, _ALONE = 10.0, 6.0


def plan_attribution(config: CompareConfig, options: Mapping[str, Any]) -> AttributionPlan:
    """Plans; loads nothing.

    Raises:
        ProbeError: The model is not there, no engine is installed, or a setting is not known.
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
    settings = settings_of(context)
    wanted = choose(settings, asked.settings)
    rows = estimate(plan)
    reasons = {
        setting.name: setting.why_missing(context)
        or ("" if setting in wanted else "slow: --settings all, or its name" if setting.slow else "not asked for")
        for setting in settings
    }
    if asked.layers and not context.engine["enforce_eager"]:
        reasons["rollout-eager"] = ""  # always beside the layers
    chosen = [setting for setting in settings if not reasons[setting.name]]
    passes = [PlannedProcess(name=str(row.pass_id), n_passes=1, seconds=row.seconds) for row in rows]
    processes = _processes(chosen, rows, asked)
    return AttributionPlan(
        model=plan.config.model,
        device=plan.device,
        passes=tuple(passes),
        processes=tuple(processes),
        settings=tuple(PlannedSetting(name=s.name, change=s.change, why=reasons[s.name]) for s in settings),
        seconds=sum(process.seconds for process in (*passes, *processes)),
        disk_gib=len(asked.layer_dtypes) * MOST_BYTES / devices.GIB if asked.layers else 0.0,
    )


def _processes(chosen: list[Setting], rows: list[PassEstimate], options: AttributeOptions) -> list[PlannedProcess]:
    decode = next(row.seconds for row in rows if row.pass_id.side == "rollout")
    score = max(1.0, next(row.seconds for row in rows if row.pass_id.side == "trainer") - _START)
    same = [setting for setting in chosen if setting.side == "rollout" and setting.arguments is None]
    alone = sum(_ALONE * decode for setting in same if setting.how == "decode-alone")
    found = [("vLLM as it sampled", 2 + len(same), decode * 2 + alone)]
    found += [(f"vLLM {s.key}", 1, decode) for s in chosen if s.side == "rollout" and s.arguments is not None]
    variants = [setting for setting in chosen if setting.side == "trainer"]
    found.append(("trainer, one change at a time", 2 + len(variants), _START + score * (2 + len(variants))))
    if options.layers:
        found.append(("layers and modules", len(options.layer_dtypes), _START + 6 * score))
    return [PlannedProcess(name=name, n_passes=passes, seconds=seconds) for name, passes, seconds in found]
