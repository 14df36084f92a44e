"""A trainer's process in an attribution: the run's tokens under one change after another, on models loaded once each.

Nothing here imports torch before the job runs.

Shape legend: `S` sequences, `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts
of a token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices, faults, registry
from mismatch_probe.engines.attribute.variants import UNKNOWN, NotThereError, TrainerVariant
from mismatch_probe.engines.base import Channel, OnTrainer, TrainerEngine
from mismatch_probe.engines.devices import peak_bytes, reset_peak
from mismatch_probe.engines.events import Advance, Identity, Total
from mismatch_probe.errors import EngineError
from mismatch_probe.metrics.ladder import Fix, next_set
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import ScoreRequest, TrainerDtype, TrainerMode

if TYPE_CHECKING:
    from mismatch_probe.engines.attribute.changes import Routing

FIXES = "fixes"
UNCHANGED = "trainer"


@dataclass(frozen=True)
class FixSearch:
    """Which classes of modules to put into FP32 together, the cheapest first.

    Attributes:
        logprobs: `[N]` the rollout's, nats.
        target: Fraction of the gap's RMS that may be left; None where no set is looked for.
        classes: That have a pass of their own.
    """

    logprobs: NDArray[np.float64]
    target: float | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TrainerVariants(OnTrainer):
    """Passes of the trainer with changes, each a file `NAME.npz` with `logprobs` `[N]` and `index` `[S]`.

    Attributes:
        trainer: As it is trained; its requests are left empty.
        variants: What to run.
        files: Where each pass goes, and the search, `FIXES`.
        sequences: `S` of the run.
        most_tokens, most_rows: What the engine's scheduler takes at once.
        fixes: Where given, classes are then put together until the target is met.
        routes: The engine's routes, for variants that follow them.
    """

    variants: Sequence[TrainerVariant]
    files: Mapping[str, Measurement]
    sequences: Sequence[ScoreRequest]
    most_tokens: int
    most_rows: int
    fixes: FixSearch | None = None
    routes: Measurement | None = None
    subject: ClassVar[str] = "The attribution's trainer"
    memory_advice: ClassVar[str] = "Attribute with a lower --memory-budget, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in passes; a phase for each."""
        channel.send(Total(len(self.variants)))
        groups: dict[tuple[TrainerDtype, TrainerMode], list[TrainerVariant]] = {}
        for variant in self.variants:
            own = (variant.dtype or self.trainer.dtype, variant.mode or self.trainer.mode)
            groups.setdefault(own, []).append(variant)
        for (dtype, mode), variants in groups.items():
            trained = (dtype, mode) == (self.trainer.dtype, self.trainer.mode)
            try:
                engine = self._load(dtype, mode)
                # Whatever is set up at first use, by shape too, is not the first variant's.
                self._warm(engine, engine.plan(self.sequences)[: None if trained else 1])
            except Exception as error:  # one dtype that fails leaves the others
                for variant in variants:
                    self._save(variant.name, self._failure(error), _nothing())
                continue
            with engine:
                channel.send(Identity(engine.identity() | devices.running()))
                channel.phase("load")
                for variant in variants:
                    self._read(engine, variant)
                    channel.send(Advance(1))
                    channel.phase(variant.name)
                if self.fixes is not None and trained:
                    self._search(engine, self.fixes, channel)
            del engine

    def _load(self, dtype: TrainerDtype, mode: TrainerMode) -> TrainerEngine:
        device: Any = self.trainer.device
        flags = registry.find(self.trainer.engine).trainer_settings(device, dtype).arguments
        return replace(self.trainer, dtype=dtype, mode=mode, flags=flags).started()

    def _read(self, engine: TrainerEngine, variant: TrainerVariant) -> None:
        """Runs one pass; a change that the model does not allow leaves one, too, with the reason."""
        import torch

        device = torch.device(self.trainer.device)
        reset_peak(device)
        try:
            facts, arrays = engine.run_on_model(lambda model: self._measured(engine, variant, model))
        except Exception as error:  # one change that fails leaves the others
            facts, arrays = self._failure(error), _nothing()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            facts["peak_bytes"] = peak_bytes(device)
        self._save(variant.name, facts | {"made_with": devices.package_versions()}, arrays)

    def _measured(
        self, engine: TrainerEngine, variant: TrainerVariant, model: Any
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts and arrays of a pass."""
        with self._changed(engine, variant, model):
            identity, batches = engine.identity(), self._plan(engine, variant)
            if variant.compiled:  # compilation is not the pass's
                self._warm(engine, batches)
            started = time.perf_counter()
            arrays = self._routed(engine, model) if variant.routes else self._score(engine, batches)
            return {"seconds": time.perf_counter() - started, "identity": identity}, arrays

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Whether a change does not exist for this model, or failed, and why."""
        if isinstance(error, NotThereError):
            return {"unsupported": str(error)}
        if isinstance(error, EngineError):  # a refusal in so many words
            return {"unsupported": error.what}
        if isinstance(error, TypeError) and "position_ids" in str(error):
            return {"unsupported": "the model numbers positions by itself"}
        return {"failed": faults.told(error, self)}

    @contextmanager
    def _changed(self, engine: TrainerEngine, variant: TrainerVariant, model: Any) -> Iterator[None]:
        """The engine with a variant's change, for the while."""
        import torch

        from mismatch_probe.engines.attribute import changes

        dtype = getattr(torch, variant.dtype or self.trainer.dtype)
        layout = "padded" if variant.layout == "rollout" else variant.layout
        with ExitStack() as stack:
            stack.enter_context(engine.changed(layout=layout, softmax_in_dtype=variant.softmax_in_dtype))
            if variant.attention is not None:
                stack.enter_context(changes.attention_of(model, variant.attention))
            if variant.kv_fp8:
                stack.enter_context(changes.kv_through_fp8(model))
            if variant.compiled:
                stack.enter_context(changes.compiled(model))
            if variant.tf32:
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
            stack.enter_context(changes.in_fp32(model, variant.fp32, dtype))
            yield

    def _plan(self, engine: TrainerEngine, variant: TrainerVariant) -> list[list[ScoreRequest]]:
        if variant.layout == "rollout":
            return engine.plan_as_rollout(self.sequences, self.most_tokens, self.most_rows)
        return engine.plan(self.sequences)

    def _warm(self, engine: TrainerEngine, batches: Sequence[Sequence[ScoreRequest]]) -> None:
        for batch in batches:
            engine.score(batch, self.trainer.temperature)

    def _score(self, engine: TrainerEngine, batches: Sequence[Sequence[ScoreRequest]]) -> dict[str, NDArray[Any]]:
        scores = {s.sequence_id: s for batch in batches for s in engine.score(batch, self.trainer.temperature)}
        found = [np.asarray(scores[request.sequence_id].logprobs) for request in self.sequences]
        return {"logprobs": np.concatenate(found), "index": np.arange(len(self.sequences))}

    def _routed(self, engine: TrainerEngine, model: Any) -> dict[str, NDArray[Any]]:
        """Passes with the trainer's own experts and with the engine's: `own` and `logprobs` `[N]`, `routes` of the
        trainer `[L, R, K]`.
        """
        from mismatch_probe.engines.attribute.changes import Routing, padded_routes

        assert self.routes is not None
        part = self.routes.load()
        if part is None or "routes" not in part[1]:
            raise NotThereError("the routes of the rollout engine were not recorded")
        wanted = part[1]["routes"]  # `UNKNOWN` where a token keeps its own
        routing = Routing(model, wanted.shape[2])
        ends = accumulate((request.length for request in self.sequences), initial=0)
        starts = dict(zip((request.sequence_id for request in self.sequences), ends, strict=False))
        seen = np.full_like(wanted, UNKNOWN)
        passes: dict[bool, dict[int, NDArray[Any]]] = {False: {}, True: {}}
        layers = list(routing.layers)
        with routing.watching():
            for batch in engine.plan(self.sequences):
                rows = _rows_of(batch, [starts[r.sequence_id] for r in batch])
                theirs = padded_routes([wanted[:, start : start + n] for _, start, n in rows], self.trainer.device)
                for follow in (False, True):
                    routing.choose(dict(zip(layers, theirs.flatten(1, 2), strict=True)) if follow else {})
                    for score in engine.score(batch, self.trainer.temperature):
                        passes[follow][score.sequence_id] = np.asarray(score.logprobs)
                    if not follow:
                        _note(routing, layers, rows, seen)
        own, followed = (np.concatenate([found[r.sequence_id] for r in self.sequences]) for found in passes.values())
        return {"own": own, "logprobs": followed, "routes": seen, "index": np.arange(len(self.sequences))}

    def _search(self, engine: TrainerEngine, search: FixSearch, channel: Channel) -> None:
        """Runs sets of classes until the target is met or none is left."""
        base = self.files[UNCHANGED].load()
        assert base is not None, "the trainer without a change is run first"
        if "seconds" not in base[0]:
            self._save(FIXES, {"failed": "the trainer without a change could not be run"}, {})
            return
        fixes = []
        for name in search.classes:
            alone = single_name(name)
            single = self.files[alone].load()
            if single is not None and "seconds" in single[0]:
                fixes.append(Fix.of((name,), search.logprobs, base, single))
        sets: list[str] = []
        target = search.target
        while target is not None and (chosen := next_set(fixes, target)) is not None:
            name = set_name(len(sets))
            self._read(engine, TrainerVariant(name, fp32=chosen))
            part = self.files[FIXES].beside(name).load()
            if part is None or "seconds" not in part[0]:
                break
            fixes.append(Fix.of(chosen, search.logprobs, base, part))
            sets.append("+".join(chosen))
            channel.phase(name)
        about = {
            "classes": search.classes,
            "sets": sets,
            "target": search.target,
            "made_with": devices.package_versions(),
        }
        self._save(FIXES, about, {})

    def _save(self, name: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        file = self.files[name] if name in self.files else self.files[FIXES].beside(name)
        file.save(facts, arrays)


def _nothing() -> dict[str, NDArray[Any]]:
    """The arrays of a pass that there is not."""
    return {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}


def single_name(name: str) -> str:
    """The pass with one class of modules in FP32."""
    return f"{UNCHANGED}-fp32-{name}"


def set_name(index: int) -> str:
    """File of the pass of a set of classes; they share the search's key."""
    return f"{FIXES}-{index}"


def _rows_of(batch: Sequence[ScoreRequest], starts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of each sequence of a padded batch: first flat row, first row among the routes, length."""
    longest = max(request.length for request in batch)
    return [(i * longest, start, r.length) for i, (r, start) in enumerate(zip(batch, starts, strict=True))]


def _note(
    routing: Routing, layers: Sequence[int], rows: Sequence[tuple[int, int, int]], seen: NDArray[np.int16]
) -> None:
    """Writes what the routers chose for a padded batch to the sequences' rows of `seen` `[L, R, K]`."""
    for k, layer in enumerate(layers):
        chosen = routing.seen[layer].cpu().numpy()
        for first, start, length in rows:
            seen[k, start : start + length] = chosen[first : first + length]
