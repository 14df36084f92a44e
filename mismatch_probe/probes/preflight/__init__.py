"""What can be known before an engine starts, from headers and configuration alone.

A module of this package registers checks: `@check(name, needs=…)` on a function from a `Subject` to findings. Those
whose needs are met run. A finding of severity `fail` means that an engine will stop, or that the two engines would be
different models; `warn` that something surprises; `info` is said by `mismatch-probe preflight` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.checkpoint import Checkpoint, count_tokens
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.errors import ProbeError
from mismatch_probe.registered import Registry
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.types import DTYPES, ROLLOUT_ENGINE, TRAINER_ENGINE, Prompt

Need = Literal["weights", "tensors", "tokenizer", "prompts", "run"]


@dataclass(frozen=True)
class Use:
    """What is to be done with the checkpoint.

    Attributes:
        rollout_dtypes: The rollout engine runs in these.
        attention: Attention of transformers, None for its own choice.
        trust_remote_code: Whether code of the checkpoint may run.
        chat: Whether plain prompts are rendered by the chat template.
        prompts: The prompts; empty where they are not known.
        max_tokens: Longest response, None where it is not known.
        device: Where engines run, None where it is not known.
        bytes_per_weight: Memory of a weight in the pass that needs most, 0 where it is not known.
        disk_bytes: What the run writes, 0 where it is not known.
        folder: Where it writes.
        rollout_engine: What samples.
        trainer_engine: What scores.
    """

    rollout_dtypes: tuple[str, ...] = DTYPES
    attention: str | None = None
    trust_remote_code: bool = False
    chat: bool = False
    prompts: tuple[Prompt, ...] = ()
    max_tokens: int | None = None
    device: devices.Device | None = None
    bytes_per_weight: float = 0.0
    disk_bytes: int = 0
    folder: Path = field(default_factory=Path)
    rollout_engine: str = ROLLOUT_ENGINE
    trainer_engine: str = TRAINER_ENGINE


def device_if_here(requested: str, rollout_engine: str) -> devices.Device | None:
    """The device that engines would run on, None where they cannot."""
    try:
        return registry.find(rollout_engine, "rollout").choose_device(requested)
    except ProbeError:
        return None


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what is to be done with it.

    Attributes:
        model: The checkpoint.
        use: What is to be done.
    """

    model: ModelRef
    use: Use

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint()

    @property
    def config(self) -> Mapping[str, Any]:
        """The language model's part of `config.json`, with the model type of the whole."""
        return {**self.model.text_config, "model_type": self.model_type}

    @property
    def model_type(self) -> str:
        found = self.model.text_config.get("model_type") or self.model.config.get("model_type")
        return str(found or "")

    @property
    def quantisation(self) -> Mapping[str, Any]:
        """The quantisation that the configuration declares, empty where there is none."""
        places = (self.model.config, self.model.text_config)
        keys = ("quantization_config", "compression_config")
        found: Any = next((config[key] for config in places for key in keys if config.get(key)), {})
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def prompt_tokens(self) -> list[int] | None:
        """Tokens of each prompt, without those that a template adds; None where they cannot be counted."""
        return count_tokens(self.checkpoint.folder, ["".join(texts_of(prompt)) for prompt in self.use.prompts])

    def exceeds(self, limit: int) -> bool:
        """Whether the longest prompt with the longest response has more tokens; False where the response is not known.

        A token is at least one byte, so tokens are counted only where bytes could be too many.
        """
        if self.use.max_tokens is None:
            return False
        most = max((len("".join(texts_of(prompt)).encode()) for prompt in self.use.prompts), default=0)
        if most + self.use.max_tokens <= limit:
            return False
        return self.prompt_tokens is None or max(self.prompt_tokens, default=0) + self.use.max_tokens > limit

    @cached_property
    def packages(self) -> frozenset[str]:
        """What the engines need, as imported."""
        names = (self.use.rollout_engine, self.use.trainer_engine)
        return frozenset(package for name in names for package in registry.find(name).packages)

    def has(self, need: Need) -> bool:
        """Whether a check's need is met."""
        match need:
            case "weights":
                return bool(self.checkpoint.files)
            case "tensors":
                return self.checkpoint.complete and bool(self.checkpoint.tensors) and not self.quantisation
            case "tokenizer":
                return self.checkpoint.tokenizer.largest_id is not None
            case "prompts":
                return bool(self.use.prompts)
            case "run":
                return self.use.device is not None


def texts_of(prompt: Prompt) -> tuple[str, ...]:
    """The text of a prompt, or of its messages."""
    if prompt.messages is None:
        return (prompt.text or "",)
    return tuple(message["content"] for message in prompt.messages)


def found(code: str, severity: Severity, where: str = "", **values: Value) -> Finding:
    """A finding with its values."""
    return Finding(code=code, severity=severity, where=where, values=values)


Look = Callable[[Subject], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """A registered check.

    Attributes:
        name: In kebab case.
        needs: What must be known.
        look: Subject to findings.
    """

    name: str
    needs: tuple[Need, ...]
    look: Look


_REGISTRY = Registry[Check](__name__, "check")


def check(name: str, *, needs: tuple[Need, ...] = ()) -> Callable[[Look], Look]:
    """Registers a check.

    Raises:
        ValueError: The name is taken.
    """

    def register(look: Look) -> Look:
        _REGISTRY.add(name, Check(name, needs, look))
        return look

    return register


def all_checks() -> dict[str, Check]:
    """Every registered check, in the order of the modules' names."""
    return _REGISTRY.all()
