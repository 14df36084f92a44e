"""A trainer step of `rl run` against a hand-written loop: same model, batch, precision and optimizer; a ratio of times.

The hand-written side has the same head on the same rows, clip, GradScaler and AdamW, and measures nothing. Both run in
one process in turn; a second run of the hand-written side shows the spread.

    python benchmarks/rl_step_vs_plain.py --device cuda --precision bfloat16-autocast --sequences 32 --micro-batch 16
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.engines.models import resolve
from mismatch_probe.probes.progress import Progress
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.instruments import Rolled
from mismatch_probe.rl.loop import Pieces, Training
from mismatch_probe.rl.policy import TORCH_DTYPES
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.run import Start, resolve_model
from mismatch_probe.types import Rollout


class NoEngine:
    """The loop loads weights into it, and asks it for nothing."""

    def load_weights(self, weights: Any) -> None:
        pass


def sequences(count: int, vocabulary: int, most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 60 to 100 tokens, and responses of half to the whole budget."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, vocabulary, int(n)).tolist() for n in draw.integers(60, 101, count)]
    responses = [draw.integers(3, vocabulary, int(n)).tolist() for n in draw.integers(most // 2, most + 1, count)]
    return prompts, responses


class Ours:
    """The updates of `mismatch_probe.rl.loop`, all that it measures of them included."""

    def __init__(self, source: Path, config: RlConfig, device: torch.device, folder: Path, data: Any) -> None:
        prompts, responses = data
        pieces: Any = Pieces(
            config,
            RlDirectory.create(folder, config, Start(resolve_model([config], Progress()), device.type).provenance()),
            source,
            device,
            NoEngine(),  # type: ignore[arg-type]
            False,
            None,  # type: ignore[arg-type]
            [],
            prompts,
            str,
            [2],
            lambda *_: None,
        )
        self._training = Training(pieces)
        n = len(prompts)
        rollouts = [Rollout(i, response, [], "stop") for i, response in enumerate(responses)]
        self._batches = self._training._batches(np.arange(n), rollouts)
        old, _ = self._training._score(self._batches)
        empty: Any = [np.empty(0)] * n
        self._rolled = Rolled(
            0, [""] * n, prompts, responses, [""] * n, [""] * n, np.zeros(n), advantages(n), old, old, empty, old
        )

    def step(self) -> None:
        self._training._update(self._batches, self._rolled)


class Plain:
    """What one would write by hand."""

    def __init__(self, source: Path, config: RlConfig, device: torch.device, data: Any) -> None:
        from transformers import AutoModelForCausalLM

        self._config, self._device, self._dtype = config, device, TORCH_DTYPES[config.trainer_dtype]
        self._masters = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
        self._model = self._masters
        if config.trainer_mode == "cast" and self._dtype != torch.float32:
            self._model = AutoModelForCausalLM.from_pretrained(source, dtype=self._dtype).to(device).eval()
        self._optimizer = torch.optim.AdamW(
            self._masters.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0
        )
        self._scaler = torch.amp.GradScaler(
            device.type, enabled=self._dtype == torch.float16, init_scale=config.initial_loss_scale
        )
        prompts, responses = data
        size = config.micro_batch
        self._micro = [
            Batch.of(prompts[i : i + size], responses[i : i + size], device) for i in range(0, len(prompts), size)
        ]
        spread = torch.tensor(advantages(len(prompts)), dtype=torch.float32, device=device)
        self._advantages = spread.split(size)
        with torch.no_grad():
            self._old = [self._logprobs(batch) for batch in self._micro]

    def _logprobs(self, batch: Batch) -> torch.Tensor:
        autocast = self._config.trainer_mode == "autocast" and self._dtype != torch.float32
        first = int(batch.first.min())
        with torch.autocast(self._device.type, self._dtype) if autocast else nullcontext():
            logits = self._model(
                batch.ids,
                attention_mask=batch.attention,
                use_cache=False,
                logits_to_keep=batch.ids.shape[1] - first + 1,
            ).logits
        at = batch.first[:, None] - first + torch.arange(batch.mask.shape[1], device=self._device)
        at = at.clamp(max=logits.shape[1] - 1)
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])).float()
        return logits.gather(2, batch.targets()[..., None])[..., 0] - logits.logsumexp(-1)

    def step(self) -> None:
        count = sum(len(batch.ids) for batch in self._micro)
        for batch, advantage, old in zip(self._micro, self._advantages, self._old, strict=True):
            ratio = (self._logprobs(batch) - old).exp()
            advantage = advantage[:, None]
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = -(gain * batch.mask).sum() / (count * self._config.max_tokens)
            self._scaler.scale(loss).backward()
        if self._model is not self._masters:
            for master, copy in zip(self._masters.parameters(), self._model.parameters(), strict=True):
                master.grad = copy.grad.float()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._masters.parameters(), self._config.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._model is not self._masters:
            self._model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for master, copy in zip(self._masters.parameters(), self._model.parameters(), strict=True):
                    copy.copy_(master)


def advantages(count: int) -> Any:
    return np.linspace(-1, 1, count)


def medians(steps: Sequence[Callable[[], None]], repeats: int, wait: Callable[[], None]) -> list[float]:
    """Seconds of each, taken in turn after two that do not count."""
    found: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        for step, seconds in zip(steps, found, strict=True):
            wait()
            start = time.perf_counter()
            step()
            wait()
            if repeat >= 2:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


@click.command()
@click.option("--model", default="chain", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", multiple=True, default=["bfloat16-autocast"], show_default=True, help="DTYPE-MODE.")
@click.option("--sequences", "count", default=32, show_default=True)
@click.option("--micro-batch", default=16, show_default=True)
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--repeats", default=10, show_default=True)
def main(
    model: str, device: str, precision: Sequence[str], count: int, micro_batch: int, max_tokens: int, repeats: int
) -> None:
    reference = resolve_model([RlConfig()], Progress()) if model == "chain" else resolve(model)
    place = torch.device(device)
    data = sequences(count, reference.config["vocab_size"], max_tokens)
    wait = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    for name in precision:
        dtype, mode = name.split("-")
        config = RlConfig(
            trainer_dtype=dtype,
            trainer_mode=mode,
            updates_per_rollout=1,
            prompts_per_step=2,
            micro_batch=micro_batch,
            max_tokens=max_tokens,
            learning_rate=1e-6,
            initial_loss_scale=256.0,
            check_sync=False,
        )
        with tempfile.TemporaryDirectory() as scratch:
            ours = Ours(reference.path, config, place, Path(scratch) / "run", data)
            plain, again = (Plain(reference.path, config, place, data) for _ in range(2))
            seconds = medians([ours.step, plain.step, again.step], repeats, wait)
            del ours, plain, again
        print(
            f"{name}: {1e3 * seconds[0]:.1f} ms against {1e3 * seconds[1]:.1f} ms by hand, ratio "
            f"{seconds[0] / seconds[1]:.3f}; by hand twice {seconds[2] / seconds[1]:.3f} (n = {count} sequences of up "
            f"to {max_tokens} tokens, micro-batches of {micro_batch}, median of {repeats})",
            flush=True,
        )


if __name__ == "__main__":
    main()
