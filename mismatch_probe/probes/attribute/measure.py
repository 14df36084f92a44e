"""The engine part of an attribution: which readings a run still lacks, and the processes that make them.

Readings that one process can make share it: one engine per configuration of vLLM, and one process for the trainer,
which holds each of its models once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.arrays import load_arrays, save_arrays
from mismatch_probe.engines import devices
from mismatch_probe.engines.attribute.inside_job import Inside, InsideJob
from mismatch_probe.engines.attribute.rollout import ROUTES, RolloutVariants, Routers
from mismatch_probe.engines.attribute.trace import (
    LOGIT_ROWS,
    TraceFiles,
    TraceRequest,
    check_room,
    choose_sequences,
    row_bytes,
)
from mismatch_probe.engines.attribute.trainer import FIXES, FixSearch, TrainerVariants, set_name
from mismatch_probe.engines.attribute.variants import FP32_CLASSES, Take, TrainerVariant
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.process import Kind
from mismatch_probe.engines.refusals import refusal
from mismatch_probe.errors import DiskFull, EngineMissing, Interrupted, ProbeError
from mismatch_probe.probes.attribute.baseline import Baseline
from mismatch_probe.probes.attribute.knobs import PREFILL, REPLAY, TRAINER, Knob, choose, knobs_of
from mismatch_probe.probes.attribute.options import AttributeOptions
from mismatch_probe.probes.own_pass import fp32_trainer, model_of
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Workers, drive
from mismatch_probe.types import Sampling, TrainerMode

FOLDER = "attribute"
AT_ROLLOUT, CAST = "trainer-at-rollout-batching", "trainer-cast-as-laid-out"
SAME_DTYPE = "trainer-in-rollout-dtype"
FOLLOWED = "trainer-routes"
# Response tokens that run one sequence at a time, where nothing fills a device, and how many of each sequence.
ALONE_TOKENS, ALONE_EACH = {"cpu": 640, "cuda": 16384}, {"cpu": 16, "cuda": 256}
Part = tuple[dict[str, Any], dict[str, NDArray[Any]]]


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


class Readings:
    """The readings of an attribution in a run's folder.

    Args:
        base: What is taken apart.
        options: The attribution's.
    """

    def __init__(self, base: Baseline, options: AttributeOptions) -> None:
        self._base, self._options = base, options
        self.knobs = knobs_of(base.context)
        chosen = choose(self.knobs, options.knobs)
        if options.layers and not base.eager:
            # Layers are seen in eager mode only, so how far that is from the baseline is always told.
            chosen += [knob for knob in self.knobs if knob.name == "rollout-eager" and knob not in chosen]
        self.chosen = tuple(chosen)
        self.wanted = tuple(knob for knob in chosen if not knob.why_missing(base.context))

    def key(self, name: str) -> str:
        """A digest of all that a reading depends on."""
        base = self._base
        knob = next((knob for knob in self.knobs if knob.name == name), None)
        if knob is not None:
            return base.key(name, knob.arguments, knob.take, knob.variant, knob.dtype, knob.environment)
        if name == FIXES:
            return base.key(name, self._options.target)
        return base.key(name)

    def file(self, name: str) -> Path:
        """Where a reading lies."""
        return self._base.run.path / FOLDER / "readings" / f"{name}.npz"

    def load(self) -> dict[str, Part]:
        """The readings that are there and were made of this run, also those that nobody asks for now."""
        names = dict.fromkeys([*self._names(self.knobs), FIXES])
        found = {name: load_arrays(self.file(name), self.key(name)) for name in names}
        parts = {name: part for name, part in found.items() if part is not None}
        for index, _ in enumerate(parts[FIXES][0].get("sets", ()) if FIXES in parts else ()):
            part = load_arrays(self.file(set_name(index)), self.key(FIXES))
            if part is not None:
                parts[set_name(index)] = part
        return parts

    def _steps(self, model: ModelRef, missing: Sequence[str]) -> list[Step]:
        """What is to be run for some readings, in order."""
        job = self._rollout_job(model)
        steps = self._rollout_steps(job, missing)
        trainer = self._trainer_step(model, missing)
        insides = self._inside_step(model, missing)
        return [*steps, *([trainer] if trainer else []), *([insides] if insides else [])]

    def make_missing(self, progress: Progress, resume: str, *, again: bool) -> None:
        """Makes the readings that are not there yet.

        Args:
            progress: Told about it.
            resume: The command that goes on after an interruption.
            again: Whether what failed gets another try.

        Raises:
            Interrupted: The user stopped it; finished readings stay.
            ProbeError: No other engine could run either.
        """
        if again:
            for name, (facts, _) in self.load().items():
                if "failed" in facts:
                    self.file(name).unlink()
        there = self.load()
        if FIXES in there and not set(self.fix_classes) <= set(there[FIXES][0].get("classes", self.fix_classes)):
            del there[FIXES]  # it was looked for among fewer classes
        missing = [name for name in self._names(self.wanted) if name not in there]
        if not missing:
            return
        steps = self._steps(model_of(self._base.run, self._base.config, progress), missing)
        try:
            with Workers(self._base.run.path / "logs") as workers:
                for index, step in enumerate(steps):
                    process = workers.take(step.kind, step.environment)
                    if index + 1 < len(steps):
                        workers.prepare(steps[index + 1].kind, steps[index + 1].environment)
                    try:
                        drive(process, step.name, step.job, progress)
                    except (DiskFull, EngineMissing):
                        raise
                    except ProbeError as error:
                        progress.end(step.name, error.what)
                        self._fail(step, error)
        except KeyboardInterrupt:
            raise Interrupted("Stopped; what is finished is kept.", f"Continue with: {resume}") from None
        finally:  # they hold the user's data, and whoever goes on makes them again
            for folder in (self._base.run.path / FOLDER).glob("trace-*"):
                TraceFiles(folder).discard()

    def _fail(self, step: Step, error: ProbeError) -> None:
        """Keeps why readings could not be made; those that the process had finished stay."""
        there = self.load()
        lost = [*step.readings, *(inside_name(dtype) for dtype in step.traces)]
        for name in (name for name in lost if name not in there):
            empty: dict[str, NDArray[Any]] = {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}
            save_arrays(self.file(name), self.key(name), {"failed": error.what}, empty)

    # What there is to read.

    def _names(self, knobs: Sequence[Knob]) -> list[str]:
        names = [REPLAY, PREFILL, TRAINER, AT_ROLLOUT]
        names += [CAST] if self._base.context.trainer_mode == "autocast" else []
        names += [SAME_DTYPE] if self._base.context.mixed else []
        names += [knob.name for knob in knobs]
        names += [FIXES] if self.fix_classes else []
        names += [ROUTES, FOLLOWED] if self._base.context.experts and not self._base.context.why_no_routes else []
        return names + [inside_name(dtype) for dtype in self.layer_dtypes]

    @property
    def why_no_layers(self) -> str:
        """Why no layer can be compared; empty where they can."""
        if not self._options.layers:
            return "left out: --no-layers"
        if not self._base.context.layers:
            return "the checkpoint's config.json does not say how many layers it has"
        ranks = self._base.engine.get("tensor_parallel_size", 1)
        return f"a model that is split over {ranks} GPUs has no whole tensors to look at" if ranks > 1 else ""

    @property
    def layer_dtypes(self) -> tuple[str, ...]:
        """Dtypes whose layers are compared: those that the engine takes."""
        if self.why_no_layers:
            return ()
        return tuple(d for d in self._options.layer_dtypes if not refusal(self._base.context.model, d))

    @property
    def fix_classes(self) -> tuple[str, ...]:
        """Classes of modules that are read in FP32."""
        names = {knob.name for knob in self.wanted}
        return tuple(name for name in FP32_CLASSES if f"trainer-fp32-{name}" in names)

    def _trace(self, dtype: str) -> str:
        return str(self._base.run.path / FOLDER / f"trace-{dtype}")

    # The processes.

    def _rollout_job(self, model: ModelRef) -> RolloutJob:
        """The engine as the comparison ran it."""
        base = self._base
        settings = self._settings(base.context.rollout_dtype)
        # Prefill has one token made behind the sequence.
        longest = max(max(s.length for s in base.sequences) + 1, int(base.engine.get("max_model_len", 1)))
        return RolloutJob(
            engine="vllm",
            model_path=str(model.path),
            dtype=base.context.rollout_dtype,  # type: ignore[arg-type]
            device=base.context.device,
            sampling=Sampling(max(len(s.response_token_ids) for s in base.sequences), 1.0, base.config.seed),
            requests=base.requests(),
            batch=base.batch,
            null_tokens=0,
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
                {reading: self.key(reading) for reading in readings},
                str(self.file("").parent),
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
        traced = [dtype for dtype in self.layer_dtypes if inside_name(dtype) in missing]
        takes: dict[str, Take] = {REPLAY: "decode", PREFILL: "prefill"}
        takes |= {k.name: k.take for k in self.wanted if k.side == "rollout" and k.arguments is None}
        takes = {name: take for name, take in takes.items() if name in missing}
        found = [_Engine("baseline", base, takes, None, eager and base in traced, eager and ROUTES in missing)]
        for knob in self.wanted:
            if knob.side == "rollout" and knob.arguments is not None and knob.name in missing:
                dtype, is_eager = knob.dtype or base, knob.key == "eager"
                # Another dtype's layers are traced by the engine that has it anyway.
                its = dtype in traced and (is_eager or (dtype != base and eager))
                routed = is_eager and ROUTES in missing
                found.append(_Engine(knob.key, dtype, {knob.name: knob.take}, knob, its, routed))
        done = {engine.dtype for engine in found if engine.traced}
        found += [_Engine(f"layers in {d}", d, {}, None, True, False) for d in traced if d not in done]
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

    def _trainer(self, model: ModelRef) -> TrainerJob:
        """The trainer as it is trained, without requests."""
        base = self._base
        wide = fp32_trainer(base.config, model, base.context.device)  # type: ignore[arg-type]
        mode: TrainerMode = base.trainer.mode  # type: ignore[assignment]
        return replace(wide, dtype=base.trainer.dtype, mode=mode, layout=base.config.trainer_layout)  # type: ignore[arg-type]

    def _trainer_step(self, model: ModelRef, missing: Sequence[str]) -> Step | None:
        base, context = self._base, self._base.context
        autocast = context.trainer_mode == "autocast"
        plain: TrainerMode | None = "cast" if autocast else None
        variants = [TrainerVariant(TRAINER), TrainerVariant(AT_ROLLOUT, layout="rollout", mode=plain)]
        if context.mixed:
            same: Any = context.rollout_dtype
            variants.append(TrainerVariant(SAME_DTYPE, layout="rollout", dtype=same, mode="cast"))
        variants += [TrainerVariant(CAST, mode="cast")] if autocast else []
        variants += [knob.variant for knob in self.wanted if knob.variant is not None]
        variants += [TrainerVariant(FOLLOWED, layout="padded", routes=True)] if context.experts else []
        needed = [variant for variant in variants if variant.name in missing]
        search = None
        if FIXES in missing and self.fix_classes:
            names = {TRAINER, *(f"trainer-fp32-{name}" for name in self.fix_classes)}
            needed = [variant for variant in variants if variant.name in missing or variant.name in names]
            search = FixSearch(base.rollout_logprobs, self._target(), self.fix_classes)
        if not needed:
            return None
        trainer = self._trainer(model)
        readings = (*(v.name for v in needed), *([FIXES] if search else []))
        job = TrainerVariants(
            trainer,
            str(self.file("").parent),
            needed,
            {name: self.key(name) for name in readings},
            base.sequences,
            base.most_tokens,
            base.batch,
            search,
            (str(self.file(ROUTES)), self.key(ROUTES)) if context.experts else None,
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

    def _inside_step(self, model: ModelRef, missing: Sequence[str]) -> Step | None:
        dtypes = [dtype for dtype in self.layer_dtypes if inside_name(dtype) in missing]
        if not dtypes:
            return None
        trainer = self._trainer(model)
        mode = self._base.context.trainer_mode
        insides = [
            Inside(
                inside_name(dtype),
                self.key(inside_name(dtype)),
                dtype,  # type: ignore[arg-type]
                "cast" if dtype == "float32" else mode,  # type: ignore[arg-type]
                self._trace(dtype),
            )
            for dtype in dtypes
        ]
        job = InsideJob(trainer, str(self.file("").parent), insides)
        settings = devices.trainer_settings(self._base.context.device, "float32")  # type: ignore[arg-type]
        return Step("layers and modules", "hf", settings.environment, job, tuple(i.name for i in insides))


def inside_name(dtype: str) -> str:
    """The reading that compares layers in a dtype."""
    return f"inside-{dtype}"


def _rms(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if len(finite) else 0.0
