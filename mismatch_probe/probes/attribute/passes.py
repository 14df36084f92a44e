"""Which passes an attribution has, by name, which of them are asked for, their files in the run's folder, and what they
hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.config import AttributeOptions
from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.engines.attribute.trainer import FIXES, set_name, single_name
from mismatch_probe.engines.attribute.variants import FP32_CLASSES
from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.pair import AttributedPair
from mismatch_probe.probes.attribute.settings import PREFILL, REPLAY, TRAINER, Setting, choose, settings_of
from mismatch_probe.runs.measurements import Part, Store
from mismatch_probe.types import DTYPES

FOLDER = "attribute"
# Passes of the ladder.
AT_ROLLOUT, CAST = "trainer-at-rollout-batching", "trainer-cast-as-laid-out"
SAME_DTYPE = "trainer-in-rollout-dtype"
FOLLOWED = "trainer-routes"
# The engine in FP32, by prefill, where it did not sample in FP32: with the trainer in FP32 it tells what is left of the
# gap without rounding.
WIDE_PREFILL = "rollout-float32-prefill"
# Of what is compared inside; another number makes all of it anew.
INSIDES = 2
NOT_MEASURED = "not measured yet; `attribute --resume` runs it"
Floats = NDArray[np.float64]


def inside_name(dtype: str) -> str:
    """The pass that compares layers in a dtype."""
    return f"inside-{dtype}"


class PassStore:
    """The passes of an attribution in a run's folder.

    Args:
        pair: What is taken apart.
        options: The attribution's.
    """

    def __init__(self, pair: AttributedPair, options: AttributeOptions) -> None:
        self._pair, self._options = pair, options
        self.files = Store(pair.run.path / FOLDER / "passes", self.key)
        self.settings = settings_of(pair.context)
        chosen = choose(self.settings, options.settings)
        if options.layers and not pair.eager:
            # Layers are seen in eager mode only, so how far that is from the sampled pass is always measured.
            chosen += [setting for setting in self.settings if setting.name == "rollout-eager" if setting not in chosen]
        self.chosen = tuple(chosen)
        self.wanted = tuple(setting for setting in chosen if not setting.why_missing(pair.context))

    def key(self, name: str) -> str:
        """A digest of all that a pass depends on."""
        pair = self._pair
        setting = next((setting for setting in self.settings if setting.name == name), None)
        if setting is not None:
            about = (setting.arguments, setting.how, setting.variant, setting.dtype, setting.environment)
            return pair.key(name, *about)
        if name.startswith(FIXES):
            name = FIXES  # every set of the search has its key
            return pair.key(name, self._options.target)
        if name in map(inside_name, DTYPES):
            return pair.key(name, INSIDES)
        return pair.key(name)

    def load(self) -> dict[str, Part]:
        """The passes that are there and were made of this run, also those that nobody asks for now."""
        parts = self.files.load(dict.fromkeys([*self.names(self.settings), FIXES]))
        sets = parts[FIXES][0].get("sets", ()) if FIXES in parts else ()
        return parts | self.files.load(set_name(index) for index, _ in enumerate(sets))

    def missing(self, *, again: bool) -> list[str]:
        """The passes that are asked for and are not there; with `again`, also those that failed, whose files go."""
        there = self.load()
        if again:
            failed = self.files.failed(there)
            self.files.forget(failed)
            there = {name: part for name, part in there.items() if name not in failed}
        if FIXES in there and not set(self.fix_classes) <= set(there[FIXES][0].get("classes", self.fix_classes)):
            del there[FIXES]  # it was looked for among fewer classes
        return [name for name in self.names(self.wanted) if name not in there]

    def names(self, settings: Sequence[Setting]) -> list[str]:
        """Every pass that an attribution with these settings has."""
        context = self._pair.context
        names = [REPLAY, PREFILL, TRAINER, AT_ROLLOUT]
        names += [CAST] if context.trainer_mode == "autocast" else []
        names += [SAME_DTYPE] if context.mixed else []
        names += [setting.name for setting in settings]
        names += [FIXES] if self.fix_classes else []
        names += [ROUTES, FOLLOWED] if not context.why_no_routes else []
        names += [WIDE_PREFILL] if self.wide == WIDE_PREFILL else []
        return names + [inside_name(dtype) for dtype in self.layer_dtypes]

    @property
    def wide(self) -> str:
        """The pass of the engine in FP32, by prefill, which runs for its layers where it did not sample in FP32; empty
        where there is none.
        """
        if self._pair.context.rollout_dtype == "float32":
            return PREFILL
        return WIDE_PREFILL if "float32" in self.layer_dtypes else ""

    @property
    def why_no_layers(self) -> str:
        """Why no layer can be compared; empty where they can."""
        if not self._options.layers:
            return "left out: --no-layers"
        if self._pair.context.why_no_inside:
            return self._pair.context.why_no_inside
        if not self._pair.context.layers:
            return "the checkpoint's config.json does not say how many layers it has"
        ranks = self._pair.engine.get("tensor_parallel_size", 1)
        return f"a model that is split over {ranks} GPUs has no whole tensors to look at" if ranks > 1 else ""

    @property
    def layer_dtypes(self) -> tuple[str, ...]:
        """Dtypes whose layers are compared, from few bits to many: those that the engine takes."""
        if self.why_no_layers:
            return ()
        wanted = (dtype for dtype in DTYPES if dtype in self._options.layer_dtypes)
        return tuple(dtype for dtype in wanted if not self._pair.context.why_no_dtype(dtype))

    @property
    def fix_classes(self) -> tuple[str, ...]:
        """Classes of modules that run in FP32."""
        names = {setting.name for setting in self.wanted}
        return tuple(name for name in FP32_CLASSES if single_name(name) in names)


@dataclass(frozen=True)
class Evidence:
    """Passes of a pair.

    Attributes:
        pair: The pair.
        store: What was asked for.
        parts: What is there, by name.
    """

    pair: AttributedPair
    store: PassStore
    parts: Mapping[str, Part]

    @property
    def seed(self) -> int:
        """Of every bootstrap."""
        return self.pair.config.seed

    @property
    def gap(self) -> Floats:
        """`[N]` d, nats."""
        return self.pair.trainer_logprobs - self.pair.rollout_logprobs

    def measured(self, name: str) -> bool:
        """Whether a pass is there and holds log-probs."""
        return name in self.parts and "seconds" in self.parts[name][0] and "failed" not in self.parts[name][0]

    def logprobs(self, name: str) -> Floats | None:
        """`[N]` of a pass over all sequences, nats; None where there is none."""
        part = self.parts.get(name)
        if part is None or len(part[1].get("logprobs", ())) != len(self.pair.rollout_logprobs):
            return None
        return np.asarray(part[1]["logprobs"], np.float64)

    def status(self, name: str) -> Literal["unsupported", "failed", "skipped"]:
        """What became of a pass that holds no log-probs."""
        if name not in self.parts:
            return "skipped"
        return "unsupported" if "unsupported" in self.parts[name][0] else "failed"

    def why(self, name: str) -> str:
        """Why a pass cannot be used."""
        part = self.parts.get(name)
        if part is None:
            return NOT_MEASURED
        return str(part[0].get("failed") or part[0].get("unsupported") or "it covers other tokens")

    def size(self, d: Floats) -> ladder.Gap:
        """How large a gap `[N]` is."""
        return ladder.gap(d, self.pair.tokens, seed=self.seed)

    def change(self, before: Floats, after: Floats) -> ladder.Change:
        """What turns one gap `[N]` into another does."""
        return ladder.change(before, after, self.pair.tokens, seed=self.seed)
