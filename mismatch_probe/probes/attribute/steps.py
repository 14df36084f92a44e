"""The processes that make readings. What one process can make shares it: one engine per configuration of vLLM, one
process for the trainer, which holds each of its models once, and one that compares both models' insides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices
from mismatch_probe.engines.attribute.inside_job import Inside, InsideJob
from mismatch_probe.engines.attribute.rollout import ROUTES, RolloutVariants, Routers
from mismatch_probe.engines.attribute.trace import (
    LOGIT_ROWS,
    TraceRequest,
    check_room,
    choose_sequences,
    row_bytes,
)
from mismatch_probe.engines.attribute.trainer import FIXES, FixSearch, TrainerVariants, single_name
from mismatch_probe.engines.attribute.variants import Take, TrainerVariant
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.process import Kind
from mismatch_probe.probes.attribute.baseline import Baseline
from mismatch_probe.probes.attribute.knobs import Knob
from mismatch_probe.probes.attribute.names import (
    AT_ROLLOUT,
    CAST,
    FOLDER,
    FOLLOWED,
    PREFILL,
    REPLAY,
    SAME_DTYPE,
    TRAINER,
    WIDE_PREFILL,
    inside_name,
)
from mismatch_probe.probes.attribute.options import AttributeOptions
from mismatch_probe.probes.own_pass import fp32_trainer
from mismatch_probe.types import Sampling, TrainerMode

if TYPE_CHECKING:
    from mismatch_probe.probes.attribute.measure import Readings

# Response tokens that run one sequence at a time, where nothing fills a device, and how many of each sequence.
ALONE_TOKENS, ALONE_EACH = {"cpu": 640, "cuda": 16384}, {"cpu": 16, "cuda": 256}


@dataclass(frozen=True)
class Step:
    """A process and what it makes.

    Attributes:
        name: Of its progress.
        kind: What the process imports.
        environment: Of the process.
        job: What it does.
        readings: Names of what it leaves.
        traces: Dtypes whose layers it traces.
    """

    name: str
    kind: Kind
    environment: Mapping[str, str]
    job: Any
    readings: tuple[str, ...]
    traces: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Engine:
    """A configuration of vLLM, and what its process makes.

    Attributes:
        name: Of its progress.
        dtype: In which it runs.
        takes: By reading, how it goes over the tokens.
        knob: That is turned; None for the baseline's configuration.
        traced: Whether its layers are looked into.
        routed: Whether the experts of every token are kept.
    """

    name: str
    dtype: str
    takes: Mapping[str, Take]
    knob: Knob | None
    traced: bool
    routed: bool


class Steps:
    """The processes of an attribution.

    Args:
        readings: What they make.
        base: What is taken apart.
        options: The attribution's.
        model: The run's own.
    """

    def __init__(self, readings: Readings, base: Baseline, options: AttributeOptions, model: ModelRef) -> None:
        self._readings, self._base, self._options, self._model = readings, base, options, model

    def of(self, missing: Sequence[str]) -> list[Step]:
        """What is to be run for some readings, in order."""
        steps = self._rollout_steps(self._rollout_job(), missing)
        trainer, insides = self._trainer_step(missing), self._inside_step(missing)
        return [*steps, *([trainer] if trainer else []), *([insides] if insides else [])]

    def _trace(self, dtype: str) -> str:
        return str(self._base.run.path / FOLDER / f"trace-{dtype}")

    def _rollout_job(self) -> RolloutJob:
        """The engine as the comparison ran it."""
        base = self._base
        settings = self._settings(base.context.rollout_dtype)
        # Prefill has one token made behind the sequence.
        longest = max(max(s.length for s in base.sequences) + 1, int(base.engine.get("max_model_len", 1)))
        return RolloutJob(
            engine="vllm",
            model_path=str(self._model.path),
            dtype=base.context.rollout_dtype,  # type: ignore[arg-type]
            device=base.context.device,
            sampling=Sampling(max(len(s.response_token_ids) for s in base.sequences), 1.0, base.config.seed),
            requests=base.requests(),
            batch=base.batch,
            self_noise_tokens=0,
            max_model_len=longest,
            in_process=base.in_process,
            trust_remote_code=base.config.trust_remote_code,
            arguments={**settings.arguments, **base.config.engine_args},
        )

    def _settings(self, dtype: str) -> devices.EngineSettings:
        base = self._base
        cache = int(base.engine.get("arguments", {}).get("kv_cache_memory_bytes", devices.GIB)) // devices.GIB
        return devices.rollout_settings(
            base.context.device,  # type: ignore[arg-type]
            dtype,  # type: ignore[arg-type]
            eager=base.config.eager,
            in_process=base.in_process,
            kv_cache_gib=max(1, cache),
        )

    def _rollout_steps(self, job: RolloutJob, missing: Sequence[str]) -> list[Step]:
        """A process for each configuration that a missing reading needs: the baseline's first."""
        steps = []
        for engine in self._engines(missing):
            changed = self._changed(job, engine)
            settings = self._settings(changed.dtype)
            environment = {**settings.environment, **(engine.knob.environment if engine.knob else {})}
            readings = (*engine.takes, *([ROUTES] if engine.routed else []))
            variants = RolloutVariants(
                changed,
                engine.takes,
                {reading: self._readings.key(reading) for reading in readings},
                str(self._readings.folder),
                self._alone(),
                self._trace_request(changed) if engine.traced else None,
                self._routers() if engine.routed else None,
            )
            traces = (changed.dtype,) if engine.traced else ()
            steps.append(Step(f"vLLM {engine.name}", "vllm", environment, variants, readings, traces))
        return steps

    def _engines(self, missing: Sequence[str]) -> list[_Engine]:
        """The baseline's engine, and one for each that differs. Hooks, for layers and routes, need an eager one."""
        base, eager = self._base.context.rollout_dtype, self._base.eager
        traced = [dtype for dtype in self._readings.layer_dtypes if inside_name(dtype) in missing]
        takes: dict[str, Take] = {REPLAY: "decode", PREFILL: "prefill"}
        takes |= {k.name: k.take for k in self._readings.wanted if k.side == "rollout" and k.arguments is None}
        takes = {name: take for name, take in takes.items() if name in missing}
        found = [_Engine("baseline", base, takes, None, eager and base in traced, eager and ROUTES in missing)]
        for knob in self._readings.wanted:
            if knob.side == "rollout" and knob.arguments is not None and knob.name in missing:
                dtype, is_eager = knob.dtype or base, knob.key == "eager"
                # Another dtype's layers are traced by the engine that has it anyway.
                its = dtype in traced and (is_eager or (dtype != base and eager))
                routed = is_eager and ROUTES in missing
                found.append(_Engine(knob.key, dtype, {knob.name: knob.take}, knob, its, routed))
        done = {engine.dtype for engine in found if engine.traced}
        left: dict[str, dict[str, Take]] = {dtype: {} for dtype in traced if dtype not in done}
        if WIDE_PREFILL in missing:
            left.setdefault("float32", {})[WIDE_PREFILL] = "prefill"
        found += [_Engine(f"layers in {d}", d, takes, None, d in traced, False) for d, takes in left.items()]
        if ROUTES in missing and not any(engine.routed for engine in found):
            at = next((i for i, e in enumerate(found) if e.traced and e.dtype == base), None)
            if at is None:
                found.append(_Engine("routes", base, {}, None, False, True))
            else:
                found[at] = replace(found[at], routed=True)
        return [engine for engine in found if engine.takes or engine.traced or engine.routed]

    def _changed(self, job: RolloutJob, engine: _Engine) -> RolloutJob:
        """The baseline's engine with a knob turned; eager where it is looked into."""
        knob, settings = engine.knob, self._settings(engine.dtype)
        arguments = {**settings.arguments, **self._base.config.engine_args}
        for name, value in ((knob and knob.arguments) or {}).items():
            before = arguments.get(name)  # what the user set of an object stays
            arguments[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
        batch = job.batch
        if "max_num_batched_tokens" in arguments and knob is not None and knob.arguments:
            batch = min(batch, int(arguments["max_num_batched_tokens"]))
        if engine.traced or engine.routed:
            arguments["enforce_eager"] = True
        return replace(job, dtype=engine.dtype, arguments=arguments, batch=batch)  # type: ignore[arg-type]

    def _alone(self) -> list[int]:
        """Response tokens of each of the sequences that run one at a time: beginnings of many, rather than few."""
        device = self._base.context.device
        each = [min(ALONE_EACH[device], len(s.response_token_ids)) for s in self._base.sequences]
        return each[: max(1, int(np.searchsorted(np.cumsum(each), ALONE_TOKENS[device], side="right")))]

    def _routers(self) -> Routers:
        context = self._base.context
        return Routers(context.layers, context.experts, context.experts_per_token, self._base.most_tokens)

    def _trace_request(self, job: RolloutJob) -> TraceRequest:
        context, lengths = self._base.context, [s.length for s in self._base.sequences]
        itemsize = 4 if job.dtype == "float32" else 2
        most = self._base.most_tokens
        chosen = choose_sequences(lengths, context.model, itemsize, most)
        rows = sum(tokens for _, tokens in chosen)
        logits = tuple(int(row) for row in np.unique(np.linspace(0, rows - 1, LOGIT_ROWS).astype(int)))
        check_room(self._base.run.path, rows * row_bytes(context.model, itemsize))
        sequences = self._base.sequences
        ids = tuple(
            tuple([*sequences[i].prompt_token_ids, *sequences[i].response_token_ids][:tokens]) for i, tokens in chosen
        )
        return TraceRequest(self._trace(job.dtype), ids, context.layers, logits)

    def _trainer(self) -> TrainerJob:
        """The trainer as it is trained, without requests."""
        base = self._base
        wide = fp32_trainer(base.config, self._model, base.context.device)  # type: ignore[arg-type]
        mode: TrainerMode = base.trainer.mode  # type: ignore[assignment]
        return replace(wide, dtype=base.trainer.dtype, mode=mode, layout=base.config.trainer_layout)  # type: ignore[arg-type]

    def _trainer_step(self, missing: Sequence[str]) -> Step | None:
        base, context = self._base, self._base.context
        autocast = context.trainer_mode == "autocast"
        plain: TrainerMode | None = "cast" if autocast else None
        variants = [TrainerVariant(TRAINER), TrainerVariant(AT_ROLLOUT, layout="rollout", mode=plain)]
        if context.mixed:
            same: Any = context.rollout_dtype
            variants.append(TrainerVariant(SAME_DTYPE, layout="rollout", dtype=same, mode="cast"))
        variants += [TrainerVariant(CAST, mode="cast")] if autocast else []
        variants += [knob.variant for knob in self._readings.wanted if knob.variant is not None]
        variants += [TrainerVariant(FOLLOWED, layout="padded", routes=True)] if context.experts else []
        needed = [variant for variant in variants if variant.name in missing]
        search = None
        if FIXES in missing and self._readings.fix_classes:
            names = {TRAINER, *(single_name(name) for name in self._readings.fix_classes)}
            needed = [variant for variant in variants if variant.name in missing or variant.name in names]
            search = FixSearch(base.rollout_logprobs, self._target(), self._readings.fix_classes)
        if not needed:
            return None
        trainer = self._trainer()
        readings = (*(v.name for v in needed), *([FIXES] if search else []))
        job = TrainerVariants(
            trainer,
            str(self._readings.folder),
            needed,
            {name: self._readings.key(name) for name in readings},
            base.sequences,
            base.most_tokens,
            base.batch,
            search,
            (str(self._readings.file(ROUTES)), self._readings.key(ROUTES)) if context.experts else None,
        )
        environment = dict(devices.trainer_settings(context.device, base.trainer.dtype).environment)  # type: ignore[arg-type]
        if any(variant.tf32 for variant in needed):
            environment.pop("NVIDIA_TF32_OVERRIDE", None)  # torch's own switch keeps FP32 passes in FP32
        return Step("trainer, one change at a time", "hf", environment, job, readings)

    def _target(self) -> float | None:
        """Part of the gap that fixes may leave; None where a trainer in FP32 would close none of it."""
        base = self._base
        if self._options.target is not None:
            return self._options.target
        if base.float32_logprobs is None:
            return None
        gaps = [_rms(a - base.rollout_logprobs) for a in (base.float32_logprobs, base.trainer_logprobs)]
        return 1 - 0.8 * (1 - gaps[0] / gaps[1]) if gaps[0] < gaps[1] else None

    def _inside_step(self, missing: Sequence[str]) -> Step | None:
        dtypes = [dtype for dtype in self._readings.layer_dtypes if inside_name(dtype) in missing]
        if not dtypes:
            return None
        trainer = self._trainer()
        mode = self._base.context.trainer_mode
        insides = [
            Inside(
                inside_name(dtype),
                self._readings.key(inside_name(dtype)),
                dtype,  # type: ignore[arg-type]
                "cast" if dtype == "float32" else mode,  # type: ignore[arg-type]
                self._trace(dtype),
            )
            for dtype in dtypes
        ]
        job = InsideJob(trainer, str(self._readings.folder), insides)
        settings = devices.trainer_settings(self._base.context.device, "float32")  # type: ignore[arg-type]
        return Step("layers and modules", "hf", settings.environment, job, tuple(i.name for i in insides))


def _rms(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if len(finite) else 0.0
