"""The policy that is trained: FP32 master weights, a forward pass in the trainer's precision, AdamW, checkpoints.

A checkpoint is a folder that any tool can load as a model, with what it takes to go on from there. No pickle: tensors
are safetensors, everything else is JSON. A folder appears by rename, so it is whole or not there.

Shape legend: `B` sequences, `L` tokens of the longest with its prompt, `T` response tokens of the longest, `V`
vocabulary.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mismatch_probe.engines.float64 import keep_float64
from mismatch_probe.engines.loading import load_model
from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.errors import DiskFull, TableError
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.records import checkpoints
from mismatch_probe.rl.routing import TrainerRouters

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_WIDER = {"float32": torch.float64}


@dataclass(frozen=True)
class StepFacts:
    """An optimizer step: the gradient's norm before clipping, and the loss scale after it. A skipped one changed
    nothing, since a gradient was not finite in FP16.
    """

    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool


class NonFinite(ArithmeticError):
    """A number that training cannot go on with; its argument names the first tensor that has one."""


class Policy:
    """Weights, optimizer, schedule and loss scale; whatever decides the next step is in `state` and can be restored.
    `routers` are those of a mixture of experts, see `rl.routing`.

    Args:
        path: Checkpoint folder.
        config: Of the run.
        device: Where it runs.
    """

    def __init__(self, path: str, config: RlConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._dtype = TORCH_DTYPES[config.trainer_dtype]

        def load(dtype: torch.dtype) -> Any:
            return load_model(path, dtype=dtype).to(device).eval()

        self.model: Any = load(torch.float32)
        # In 16 bits `cast` computes with a copy; everywhere else the masters themselves compute. The copy is loaded,
        # since casting the whole module would cast its rotary frequencies too, which transformers keeps in FP32.
        copied = config.trainer_mode == "cast" and self._dtype != torch.float32
        self._compute: Any = load(self._dtype) if copied else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(
            device.type,
            enabled=self._dtype == torch.float16,
            init_scale=config.initial_loss_scale,
            growth_interval=config.loss_scale_growth_interval,
        )
        self.updates = 0
        self.routers = TrainerRouters.of(self._compute, config, path)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole state dict in FP32, tied tensors under each of their names: what an engine has to be given."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def as_saved(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights by the names, and in the shapes, that a checkpoint on disk has: the ones that an engine loads. In the
        model's own state dict experts are fused, and some names are others.
        """
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, dict(weights)))

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, T]` log-probs of the response tokens at the run's temperature, nats, with their gradients, and the
        logits `[B, T, V]` in FP32 that they came from. Where there is no token the values mean nothing: mask them.
        """
        with self._precision(), self.routers.following(batch) if self.routers else nullcontext():
            return token_logprobs(self._compute, batch, self._config.temperature)

    @torch.no_grad()
    def clean_logprobs(self, batch: Batch, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`[B, T]` log-probs in FP32 with other weights put in the model's place, at temperature 1."""
        given = {name: tensor.float() for name, tensor in weights.items()}
        return token_logprobs(self.model, batch, 1.0, given)[0]

    @torch.no_grad()
    def rounded_logprobs(self, batch: Batch, weights: Mapping[str, torch.Tensor], dtype: str) -> torch.Tensor:
        """`[B, T]` the same in another precision: 16 bits, or float64 for what FP32 itself rounds."""
        given = {name: tensor.to(_WIDER.get(dtype, TORCH_DTYPES.get(dtype))) for name, tensor in weights.items()}
        with keep_float64(self.model) if dtype in _WIDER else nullcontext():
            return token_logprobs(self.model, batch, 1.0, given)[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a micro-batch's share of the loss, in FP32 whatever the pass computes in."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._compute is not self.model:
            for master, copy in zip(self.model.parameters(), self._compute.parameters(), strict=True):
                if copy.grad is not None:
                    wide, copy.grad = copy.grad.float(), None
                    master.grad = wide if master.grad is None else master.grad.add_(wide)

    def step(self) -> StepFacts:
        """Unscales, clips, steps, and hands the new weights to the copy that computes.

        Raises:
            NonFinite: A gradient is, and there is no loss scale to lower; nothing was stepped.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        # With a loss scale such a step is skipped, and the scale falls; without one it would end the weights. Asked
        # before clipping, which would spread a NaN over all gradients.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise NonFinite(self.non_finite() or "the gradient's norm")
        if self._config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, total)
        rate = self._config.learning_rate * self._rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._compute is not self.model:
            self._refresh()
        after = self.scaler.get_scale()
        skipped = self.scaler.is_enabled() and after < before
        # The schedule counts what was stepped, as Adam's bias correction does.
        self.updates += not skipped
        return StepFacts(norm, rate, after, skipped)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def non_finite(self) -> str | None:
        """The first tensor whose gradient or weight is not finite, by name."""
        for name, tensor in self.model.named_parameters():
            if tensor.grad is not None and not torch.isfinite(tensor.grad).all():
                return f"gradient of {name}"
        for name, tensor in self.model.named_parameters():
            if not torch.isfinite(tensor).all():
                return str(name)
        return None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's tensors by parameter name, and the numbers beside them."""
        names = [name for name, _ in self.model.named_parameters()]
        moments = {
            f"{names[index]}.{key}": value if value.ndim else value[None]
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return moments, {"updates": self.updates, "scaler": self.scaler.state_dict()}

    def restore(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]
    ) -> None:
        """Continues where `state` and `weights` were taken.

        Raises:
            TableError: They are not those of this model; nothing was changed.
        """
        # A parameter that no loss has reached yet has no moments.
        moved = {
            index: (name, parameter.shape)
            for index, (name, parameter) in enumerate(self.model.named_parameters())
            if any(f"{name}.{key}" in moments for key in _MOMENTS)
        }
        shapes = {
            f"{name}.{key}": (1,) if key == "step" else shape for name, shape in moved.values() for key in _MOMENTS
        }
        _compare_shapes(weights, {name: tensor.shape for name, tensor in self.weights().items()})
        _compare_shapes(moments, shapes)
        self.model.load_state_dict(dict(weights))
        document = self.optimizer.state_dict()
        # Copies, since the optimizer would go on with the very tensors.
        document["state"] = {
            index: {key: moments[f"{name}.{key}"].clone().reshape(() if key == "step" else shape) for key in _MOMENTS}
            for index, (name, shape) in moved.items()
        }
        self.optimizer.load_state_dict(document)
        # A run in another dtype left no loss scale: this one begins with its own.
        if numbers["scaler"]:
            self.scaler.load_state_dict(dict(numbers["scaler"]))
        self.updates = int(numbers["updates"])
        if self._compute is not self.model:
            self._refresh()

    @contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with other FP32 weights for the while, e.g. those that an engine still has."""
        own = {name: tensor.clone() for name, tensor in self.weights().items()}
        try:
            self.model.load_state_dict(dict(weights))
            if self._compute is not self.model:
                self._refresh()
            yield
        finally:
            self.model.load_state_dict(own)
            if self._compute is not self.model:
                self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        for master, copy in zip(self.model.parameters(), self._compute.parameters(), strict=True):
            copy.copy_(master)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._config.trainer_mode == "autocast" and self._dtype != torch.float32:
            return torch.autocast(self._device.type, self._dtype)
        return nullcontext()

    def _rate_factor(self) -> float:
        config = self._config
        if self.updates < config.warmup_steps:
            return (self.updates + 1) / config.warmup_steps
        total = config.steps * config.updates_per_rollout
        done = min(1.0, (self.updates - config.warmup_steps) / max(1, total - config.warmup_steps))
        if config.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0


def _compare_shapes(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    found = {name: tensor.shape for name, tensor in tensors.items()}
    differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if differing:
        raise TableError(
            f"The checkpoint belongs to another model: {differing[0]} differs ({len(differing)} tensors do).",
            "Delete it to resume from an earlier one.",
        )


_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    Attributes:
        weights: FP32.
        moments: Of the optimizer, by parameter.
        history: Weights of earlier steps, oldest first, where stale weights are rolled out.
        state: Everything else, as JSON; `step` is the next one.
    """

    weights: Weights
    moments: Weights
    history: Sequence[Weights]
    state: dict[str, Any]


def save_checkpoint(folder: Path, model: Any, checkpoint: Checkpoint, source: Path) -> Path:
    """Writes `folder/step-000012`.

    Args:
        folder: Of all checkpoints.
        model: The model, whose `save_pretrained` writes the part that any tool can load.
        checkpoint: What to keep.
        source: Folder of the original model, for its tokenizer.

    Raises:
        DiskFull: There is no room; earlier checkpoints stay.
        TableError: It cannot be written.
    """
    target = folder / f"step-{checkpoint.state['step']:06d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        for name in _TOKENIZER:
            if (source / name).exists():
                shutil.copy(source / name, temporary / name)
        save_file(_contiguous(checkpoint.weights), temporary / "masters.st")
        save_file(_contiguous(checkpoint.moments), temporary / "optimizer.st")
        for index, weights in enumerate(checkpoint.history):
            save_file(_contiguous(weights), temporary / f"history-{index}.st")
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, allow_nan=False), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as an error of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFull(
                f"The disk is full: checkpoint {target.name} was not written.",
                "Free space, then continue with --resume. Earlier checkpoints are kept.",
            ) from error
        if isinstance(error, OSError):
            raise TableError(
                f"{target} cannot be written: {error.strerror or error}.", "Check the folder's permissions."
            ) from error
        raise
    return target


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads one.

    Raises:
        TableError: It is missing or broken.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        history = [load_file(folder / f"history-{index}.st") for index in range(int(state["n_history"]))]
        return Checkpoint(load_file(folder / "masters.st"), load_file(folder / "optimizer.st"), history, state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TableError(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}).",
            "Delete it to resume from an earlier one.",
        ) from None


def prune(folder: Path, keep: Sequence[str]) -> None:
    """Removes all checkpoints but the named ones and the newest."""
    found = checkpoints(folder)
    for path in found[:-1]:
        if path.name not in keep:
            shutil.rmtree(path)


def _contiguous(weights: Weights) -> dict[str, torch.Tensor]:
    """safetensors wants no shared memory, which tied tensors have."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
