"""The settings of both sides that can make a gap, one by one, and why one does not exist here.

What exists is read from the installed packages' files and the device, without importing either engine. Line references
are to vLLM 0.32 and transformers 5.19. What asks answers with a reason, empty where the setting exists. A module of
this package that registers settings is found by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mismatch_probe.engines import registry
from mismatch_probe.engines.attribute.trace import experts_of, layers_of, why_no_routes
from mismatch_probe.engines.attribute.trainer import UNCHANGED
from mismatch_probe.engines.attribute.variants import PassKind, TrainerVariant
from mismatch_probe.engines.checkpoint import text_config
from mismatch_probe.errors import UsageError
from mismatch_probe.registered import Registry
from mismatch_probe.results.attribution import Side
from mismatch_probe.types import ROLLOUT_ENGINE

# What settings are compared with: decoded again, by prefill, and the trainer once more.
REPLAY, PREFILL, TRAINER = "rollout-replay", "rollout-prefill", UNCHANGED
ALREADY = "it is set already"
"""The comparison ran with the setting."""
# Layouts that `compare` has; the others exist to be measured only.
_LAYOUTS = ("single", "padded", "packed")


@dataclass(frozen=True)
class Context:
    """What decides which settings exist.

    Attributes:
        device: `cpu` or `cuda`.
        gpus: How many.
        rollout_dtype, trainer_dtype: Of the pair.
        trainer_mode: `cast` or `autocast`.
        trainer_layout: `single`, `padded` or `packed`.
        model: The checkpoint's `config.json`.
        engine: What the rollout pass said of itself; empty where it has not run.
        attention: What the trainer pass said of its attention; empty where it has not run.
        rollout_engine: Name of the rollout engine.
    """

    device: str
    gpus: int
    rollout_dtype: str
    trainer_dtype: str
    trainer_mode: str
    trainer_layout: str
    model: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)
    attention: str = ""
    rollout_engine: str = ROLLOUT_ENGINE

    def why_no_dtype(self, dtype: str) -> str:
        """Why the rollout engine does not run the model in a dtype; empty where it does, as far as is known."""
        return registry.find(self.rollout_engine).why_no_dtype(self.model, dtype)

    @property
    def why_no_inside(self) -> str:
        """Why layers and routers of the rollout engine cannot be seen; empty where they can."""
        shown = registry.find(self.rollout_engine).shows_inside
        return "" if shown else f"the engine {self.rollout_engine} does not show its layers"

    @property
    def nested(self) -> Mapping[str, Any]:
        """The text model's part of the configuration."""
        return text_config(self.model)

    @property
    def mixed(self) -> bool:
        """Whether the two sides have different dtypes."""
        return self.rollout_dtype != self.trainer_dtype

    @property
    def layers(self) -> int:
        """Decoder layers, 0 where the configuration does not say."""
        return layers_of(self.model)

    @property
    def why_no_routes(self) -> str:
        """Why routes cannot be read off a router's logits; empty where they can."""
        return self.why_no_inside or why_no_routes(self.model)

    @property
    def experts(self) -> int:
        """Experts of a layer, 0 where it has none."""
        return experts_of(self.model)


def same(dtype: str, wanted: str) -> str:
    return f"it is in {wanted} already" if dtype == wanted else ""


@dataclass(frozen=True)
class Setting:
    """One setting of one side.

    Attributes:
        side: Whose.
        key: Its name; the same on both sides where it is the same setting.
        change: What it changes, as a phrase.
        why_not: Why it does not exist in a context; empty where it does.
        how: For the engine: how it goes over the tokens.
        arguments: For an engine of its own: what vLLM is given; None for the engine as it sampled.
        environment: Of that engine's process.
        dtype: Of that engine, where it is another.
        variant: For the trainer.
        slow: Not among the default ones, since it takes minutes.
        unchanged: The pass that it is compared with.
    """

    side: Side
    key: str
    change: str
    why_not: Callable[[Context], str] = field(default=lambda _: "")
    how: PassKind = "decode"
    arguments: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    variant: TrainerVariant | None = None
    slow: bool = False
    unchanged: str = REPLAY

    def why_missing(self, context: Context) -> str:
        """Why there is nothing to measure; empty where there is."""
        given = context.engine.get("arguments", {})
        if self.arguments and all(given.get(name) == value for name, value in self.arguments.items()):
            return ALREADY
        names = (*(self.arguments or {}), *self.environment)
        engine = registry.find(context.rollout_engine)
        return (names and engine.why_no_settings(names)) or self.why_not(context)

    @property
    def name(self) -> str:
        """Unique; also the file of its pass."""
        return f"{self.side}-{self.key}"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `compare` that set it; none where there are none."""
        return tuple(_trainer_options(self.variant) if self.variant is not None else self._engine_options())

    def _engine_options(self) -> Iterator[str]:
        if self.dtype is not None:
            yield from ("--rollout-dtypes", self.dtype)
        if self.how == "decode-alone":
            yield from ("--rollout-batch", "1")
        for name, value in (self.arguments or {}).items():
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            yield from ("--eager",) if (name, value) == ("enforce_eager", True) else ("--engine-arg", f"{name}={text}")


def _trainer_options(variant: TrainerVariant) -> Iterator[str]:
    if variant.attention is not None:
        yield from ("--trainer-attn", variant.attention)
    if variant.layout in _LAYOUTS:
        yield from ("--trainer-layout", variant.layout)
    if variant.mode is not None:
        yield from ("--trainer-mode", variant.mode)
    if variant.dtype is not None:
        yield from ("--trainer-dtypes", variant.dtype)


Make = Callable[[Context], list[Setting]]
_REGISTRY = Registry[Make](__name__, "setting")


def settings(make: Make) -> Make:
    """Registers settings: all that a context has, whether they exist there or not."""
    _REGISTRY.add(f"{make.__module__}.{make.__name__}", make)
    return make


def settings_of(context: Context) -> list[Setting]:
    """Every setting of both sides, those of the rollout first, whether it exists here or not."""
    return sorted((one for make in _REGISTRY.all().values() for one in make(context)), key=lambda setting: setting.side)


def choose(settings: Sequence[Setting], wanted: Sequence[str]) -> list[Setting]:
    """The settings that are asked for.

    Args:
        settings: All.
        wanted: `default`, `all`, `none`, keys (both sides), or `rollout:key`, `trainer:key`.

    Raises:
        UsageError: A name is none of those.
    """
    found: list[Setting] = []
    for name in wanted:
        side, _, key = name.rpartition(":")
        if name == "none":
            continue
        if name in ("default", "all"):
            matching = [setting for setting in settings if name == "all" or not setting.slow]
        else:
            matching = [setting for setting in settings if setting.key == key and side in ("", setting.side)]
            if not matching:
                known = ", ".join(sorted({setting.key for setting in settings}))
                raise UsageError(
                    f"--settings does not know {name!r}.",
                    f"Known are default, all, none, and: {known}; write rollout: or trainer: before one for one side.",
                )
        found += [setting for setting in matching if setting not in found]
    return found
