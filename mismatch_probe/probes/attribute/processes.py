"""The processes that make an attribution's passes: one for each configuration of the engine, one of the trainer that
loads its models once, and one that compares both models' insides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.config import AttributeOptions
from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.attribute.inside_job import Inside, InsideJob
from mismatch_probe.engines.attribute.rollout import ROUTES, RolloutVariants
from mismatch_probe.engines.attribute.trace import (
    LOGIT_ROWS,
    Routers,
    TraceRequest,
    check_room,
    choose_sequences,
    row_bytes,
)
from mismatch_probe.engines.attribute.trainer import FIXES, FixSearch, TrainerVariants, single_name
from mismatch_probe.engines.attribute.variants import PassKind, TrainerVariant
from mismatch_probe.engines.base import Job, RolloutJob, TrainerJob
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.probes.attribute.pair import AttributedPair
from mismatch_probe.probes.attribute.passes import (
    AT_ROLLOUT,
    CAST,
    FOLDER,
    FOLLOWED,
    SAME_DTYPE,
    WIDE_PREFILL,
    PassStore,
    inside_name,
)
from mismatch_probe.probes.attribute.settings import PREFILL, REPLAY, TRAINER, Setting
from mismatch_probe.probes.own_pass import fp32_trainer
from mismatch_probe.probes.workers import Wanted
from mismatch_probe.types import Sampling, TrainerMode

# Response tokens that run one sequence at a time, where nothing fills a device, and how many of each sequence.
ALONE_TOKENS, ALONE_EACH = {"cpu": 640, "cuda": 16384}, {"cpu": 16, "cuda": 256}


@dataclass(frozen=True)
class Process:
    """A process and what it makes.

    Attributes:
        name: Of its progress.
        wanted: Its engine and settings.
        job: What it does.
        passes: Names of what it leaves.
        traces: Dtypes whose layers it traces.
    """

    name: str
    wanted: Wanted
    job: Job
    passes: tuple[str, ...]
    traces: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Engine:
    """A configuration of the rollout engine, and what its process makes.

    Attributes:
        name: Of its progress.
        dtype: In which it runs.
        passes: By name, how it goes over the tokens.
        setting: That is changed; None for the engine as it sampled.
        traced: Whether its layers are looked into.
        routed: Whether the experts of every token are kept.
    """

    name: str
    dtype: str
    passes: Mapping[str, PassKind]
    setting: Setting | None
    traced: bool
    routed: bool


class Processes:
    """The processes of an attribution.

    Args:
        store: Where their passes go.
        pair: What is taken apart.
        options: The attribution's.
        model: The run's own.
    """

    def __init__(self, store: PassStore, pair: AttributedPair, options: AttributeOptions, model: ModelRef) -> None:
        self._store, self._pair, self._options, self._model = store, pair, options, model

    def of(self, missing: Sequence[str]) -> list[Process]:
        """What is to be run for some passes, in order."""
        found = self._rollouts(self._rollout_job(), missing)
        trainer, insides = self._trainer_process(missing), self._inside_process(missing)
        return [*found, *([trainer] if trainer else []), *([insides] if insides else [])]

    def _trace(self, dtype: str) -> str:
        return str(self._pair.run.path / FOLDER / f"trace-{dtype}")

    def _rollout_job(self) -> RolloutJob:
        """The engine as the comparison ran it."""
        pair = self._pair
        settings = self._settings(pair.context.rollout_dtype)
        # Prefill has one token made behind the sequence.
        longest = max(max(s.length for s in pair.sequences) + 1, int(pair.engine.get("max_model_len", 1)))
        return RolloutJob(
            engine=pair.rollout.engine,
            model_path=str(self._model.path),
            dtype=pair.context.rollout_dtype,  # type: ignore[arg-type]
            device=pair.context.device,
            sampling=Sampling(max(len(s.response_token_ids) for s in pair.sequences), 1.0, pair.config.seed),
            requests=pair.requests(),
            batch=pair.batch,
            self_noise_tokens=0,
            max_model_len=longest,
            in_process=pair.in_process,
            trust_remote_code=pair.config.trust_remote_code,
            arguments={**settings.arguments, **pair.config.engine_args},
        )

    def _settings(self, dtype: str) -> devices.EngineSettings:
        pair = self._pair
        cache = int(pair.engine.get("arguments", {}).get("kv_cache_memory_bytes", devices.GIB)) // devices.GIB
        return registry.find(pair.rollout.engine).rollout_settings(
            pair.context.device,  # type: ignore[arg-type]
            dtype,  # type: ignore[arg-type]
            eager=pair.config.eager,
            in_process=pair.in_process,
            kv_cache_gib=max(1, cache),
        )

    def _rollouts(self, job: RolloutJob, missing: Sequence[str]) -> list[Process]:
        """A process for each configuration that a missing pass needs: the one that sampled first."""
        found = []
        for engine in self._engines(missing):
            changed = self._changed(job, engine)
            # A process of its own each: a process that had an engine before shows a larger peak of memory.
            settings = replace(self._settings(changed.dtype), reusable=False)
            if engine.setting:
                settings = replace(settings, environment={**settings.environment, **engine.setting.environment})
            passes = (*engine.passes, *([ROUTES] if engine.routed else []))
            variants = RolloutVariants(
                changed,
                engine.passes,
                {name: self._store.files.at(name) for name in passes},
                self._alone(),
                self._trace_request(changed) if engine.traced else None,
                self._routers() if engine.routed else None,
            )
            traces = (changed.dtype,) if engine.traced else ()
            found.append(Process(f"rollout {engine.name}", (job.engine, settings), variants, passes, traces))
        return found

    def _engines(self, missing: Sequence[str]) -> list[_Engine]:
        """The engine as it sampled, and one for each that differs. Hooks, for layers and routes, need an eager one."""
        own, eager = self._pair.context.rollout_dtype, self._pair.eager
        traced = [dtype for dtype in self._store.layer_dtypes if inside_name(dtype) in missing]
        passes: dict[str, PassKind] = {REPLAY: "decode", PREFILL: "prefill"}
        passes |= {s.name: s.how for s in self._store.wanted if s.side == "rollout" and s.arguments is None}
        passes = {name: how for name, how in passes.items() if name in missing}
        found = [_Engine("as it sampled", own, passes, None, eager and own in traced, eager and ROUTES in missing)]
        for setting in self._store.wanted:
            if setting.side == "rollout" and setting.arguments is not None and setting.name in missing:
                dtype, is_eager = setting.dtype or own, setting.key == "eager"
                # Another dtype's layers are traced by the engine that has it anyway.
                its = dtype in traced and (is_eager or (dtype != own and eager))
                routed = is_eager and ROUTES in missing
                found.append(_Engine(setting.key, dtype, {setting.name: setting.how}, setting, its, routed))
        done = {engine.dtype for engine in found if engine.traced}
        left: dict[str, dict[str, PassKind]] = {dtype: {} for dtype in traced if dtype not in done}
        if WIDE_PREFILL in missing:
            left.setdefault("float32", {})[WIDE_PREFILL] = "prefill"
        found += [_Engine(f"layers in {d}", d, passes, None, d in traced, False) for d, passes in left.items()]
        if ROUTES in missing and not any(engine.routed for engine in found):
            at = next((i for i, e in enumerate(found) if e.traced and e.dtype == own), None)
            if at is None:
                found.append(_Engine("routes", own, {}, None, False, True))
            else:
                found[at] = replace(found[at], routed=True)
        return [engine for engine in found if engine.passes or engine.traced or engine.routed]

    def _changed(self, job: RolloutJob, engine: _Engine) -> RolloutJob:
        """The engine with a setting changed; eager where it is looked into."""
        setting, settings = engine.setting, self._settings(engine.dtype)
        arguments = {**settings.arguments, **self._pair.config.engine_args}
        for name, value in ((setting and setting.arguments) or {}).items():
            before = arguments.get(name)  # what the user set of an object stays
            arguments[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
        batch = job.batch
        if "max_num_batched_tokens" in arguments and setting is not None and setting.arguments:
            batch = min(batch, int(arguments["max_num_batched_tokens"]))
        if engine.traced or engine.routed:
            arguments["enforce_eager"] = True
        return replace(job, dtype=engine.dtype, arguments=arguments, batch=batch)  # type: ignore[arg-type]

    def _alone(self) -> list[int]:
        """Response tokens of each of the sequences that run one at a time: beginnings of many, rather than few."""
        device = self._pair.context.device
        each = [min(ALONE_EACH[device], len(s.response_token_ids)) for s in self._pair.sequences]
        return each[: max(1, int(np.searchsorted(np.cumsum(each), ALONE_TOKENS[device], side="right")))]

    def _routers(self) -> Routers:
        return Routers.of(self._pair.context.model, self._pair.most_tokens)

    def _trace_request(self, job: RolloutJob) -> TraceRequest:
        context, lengths = self._pair.context, [s.length for s in self._pair.sequences]
        itemsize = 4 if job.dtype == "float32" else 2
        most = self._pair.most_tokens
        chosen = choose_sequences(lengths, context.model, itemsize, most)
        rows = sum(tokens for _, tokens in chosen)
        logits = tuple(int(row) for row in np.unique(np.linspace(0, rows - 1, LOGIT_ROWS).astype(int)))
        check_room(self._pair.run.path, rows * row_bytes(context.model, itemsize))
        sequences = self._pair.sequences
        ids = tuple(
            tuple([*sequences[i].prompt_token_ids, *sequences[i].response_token_ids][:tokens]) for i, tokens in chosen
        )
        return TraceRequest(self._trace(job.dtype), ids, context.layers, logits)

    def _trainer(self) -> TrainerJob:
        """The trainer as it is trained, without requests."""
        pair = self._pair
        wide = fp32_trainer(pair.config, self._model, pair.context.device)  # type: ignore[arg-type]
        mode: TrainerMode = pair.trainer.mode  # type: ignore[assignment]
        return replace(wide, dtype=pair.trainer.dtype, mode=mode, layout=pair.config.trainer_layout)  # type: ignore[arg-type]

    def _trainer_process(self, missing: Sequence[str]) -> Process | None:
        pair, context = self._pair, self._pair.context
        autocast = context.trainer_mode == "autocast"
        plain: TrainerMode | None = "cast" if autocast else None
        variants = [TrainerVariant(TRAINER), TrainerVariant(AT_ROLLOUT, layout="rollout", mode=plain)]
        if context.mixed:
            same: Any = context.rollout_dtype
            variants.append(TrainerVariant(SAME_DTYPE, layout="rollout", dtype=same, mode="cast"))
        variants += [TrainerVariant(CAST, mode="cast")] if autocast else []
        variants += [setting.variant for setting in self._store.wanted if setting.variant is not None]
        variants += [TrainerVariant(FOLLOWED, layout="padded", routes=True)] if context.experts else []
        needed = [variant for variant in variants if variant.name in missing]
        search = None
        if FIXES in missing and self._store.fix_classes:
            names = {TRAINER, *(single_name(name) for name in self._store.fix_classes)}
            needed = [variant for variant in variants if variant.name in missing or variant.name in names]
            search = FixSearch(pair.rollout_logprobs, self._target(), self._store.fix_classes)
        if not needed:
            return None
        trainer = self._trainer()
        passes = (*(v.name for v in needed), *([FIXES] if search else []))
        job = TrainerVariants(
            trainer,
            needed,
            {name: self._store.files.at(name) for name in passes},
            pair.sequences,
            pair.most_tokens,
            pair.batch,
            search,
            self._store.files.at(ROUTES) if context.experts else None,
        )
        settings = registry.find(trainer.engine).trainer_settings(context.device, trainer.dtype)  # type: ignore[arg-type]
        if any(variant.tf32 for variant in needed):
            settings.environment.pop("NVIDIA_TF32_OVERRIDE", None)  # torch's own switch keeps FP32 passes in FP32
        return Process("trainer, one change at a time", (trainer.engine, settings), job, passes)

    def _target(self) -> float | None:
        """Fraction of the gap's RMS that fixes may leave; None where a trainer in FP32 would close none of it."""
        pair = self._pair
        if self._options.target is not None:
            return self._options.target
        if pair.float32_logprobs is None:
            return None
        gaps = [_rms(a - pair.rollout_logprobs) for a in (pair.float32_logprobs, pair.trainer_logprobs)]
        return 1 - 0.8 * (1 - gaps[0] / gaps[1]) if gaps[0] < gaps[1] else None

    def _inside_process(self, missing: Sequence[str]) -> Process | None:
        dtypes = [dtype for dtype in self._store.layer_dtypes if inside_name(dtype) in missing]
        if not dtypes:
            return None
        trainer = self._trainer()
        mode = self._pair.context.trainer_mode
        insides = [
            Inside(
                inside_name(dtype),
                self._store.files.at(inside_name(dtype)),
                dtype,  # type: ignore[arg-type]
                "cast" if dtype == "float32" else mode,  # type: ignore[arg-type]
                self._trace(dtype),
            )
            for dtype in dtypes
        ]
        job = InsideJob(trainer, insides)
        settings = registry.find(trainer.engine).trainer_settings(self._pair.context.device, "float32")  # type: ignore[arg-type]
        return Process("layers and modules", (trainer.engine, settings), job, tuple(i.name for i in insides))


def _rms(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if len(finite) else 0.0
