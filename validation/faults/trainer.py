"""A trainer's forward pass over recorded sequences, right or wrong in a stated way.

Shape legend: `B` rows of a forward pass, `L` their length, `R` response tokens, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.types import Dtype
from validation.faults.models import Model
from validation.faults.weights import tensors

Floats = NDArray[np.float64]
Layout = Literal["right", "single", "left-unnumbered", "left-attended", "packed", "packed-leak"]
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FILL = -1e4


@dataclass(frozen=True)
class View:
    """How the trainer sees the sequences.

    Attributes:
        dtype: Of weights and compute.
        weights: See `weights`.
        temperature: What logits are divided by.
        layout: `right` pads behind; `left-unnumbered` pads before prompts and counts positions through the padding,
            `left-attended` also attends to it; `packed` separates sequences of a packed row, `packed-leak` does not.
        batch: Rows side by side, or sequences of a packed row.
        positions: A change of the position ids: `bf16`, `clip:P`, `half:P` (half steps from P on), `divide:F`.
        rope: A change of the rotary frequencies: `theta:X`, `yarn:F`, `lost:0` (all of them 1).
        attention: Implementation of transformers.
        window: Tokens that attention sees back; 0 for all.
        sink: A logit that takes its part of each attention row.
        cap: What logits are softly capped at; 0 for none.
        dropout, seed: Of the output of every MLP.
        bits: Mantissa bits that the residual stream keeps; 0 for all.
        softmax: `rounded` in BF16, or BF16 logits less their BF16 normaliser (`subtracted`).
        keep: Truncation of the distribution, e.g. `top_p:.9`; the token itself is always kept.
        extra_rows: Rows of zeros that the head is padded with, in the softmax.
        decode: Penalties for repetition, presence, frequency.
        prefix: Text that the trainer has before each prompt, after a `<s>`.
        drop: Ids that it lacks at the beginning of each prompt.
    """

    dtype: Dtype
    weights: str = ""
    temperature: float = 1.0
    layout: Layout = "right"
    batch: int = 8
    positions: str = ""
    rope: str = ""
    attention: str = "sdpa"
    window: int = 0
    sink: float | None = None
    cap: float = 0.0
    dropout: float = 0.0
    seed: int = 0
    bits: int = 0
    softmax: str = ""
    keep: str = ""
    extra_rows: int = 0
    decode: tuple[float, float, float] = field(default=(1.0, 0.0, 0.0))
    prefix: str = ""
    drop: int = 0

    @cached_property
    def key(self) -> str:
        changed = {name: value for name, value in asdict(self).items() if (name, value) != ("attention", "sdpa")}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


class Trainer:
    """Scores with one model at a time; it stays loaded for as long as the next one asks for the same.

    Args:
        folder: Of the bench, where updated weights are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: tuple[str, str, str] | None = None
        self._network: Any = None

    def _load(self, model: Model, view: View) -> Any:
        wanted = (model.name, view.dtype, view.weights)
        if self._held != wanted:
            from mismatch_probe.engines.loading import load_model, with_weights

            same_family = self._held is not None and self._held[:2] == wanted[:2] and bool(view.weights)
            network = self._network if same_family else None
            self._network = None
            if network is None:
                network = load_model(str(model.path), dtype=_TORCH[view.dtype], attn_implementation="sdpa")
            if view.weights:
                network = with_weights(network, tensors(self._folder, model, view.weights))
                network.set_attn_implementation("sdpa")
            self._network, self._held = network.eval().requires_grad_(False), wanted
        return self._network

    @torch.no_grad()
    def score(self, model: Model, view: View, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Floats]:
        """Log-probs of the response tokens of `(prompt, response)`, nats."""
        network = self._load(model, view)
        torch.manual_seed(view.seed)
        pairs = [(_seen(model, view, prompt), list(response)) for prompt, response in sequences]
        found: list[Floats] = []
        with ExitStack() as stack:
            for change in _changes(network, view):
                stack.enter_context(change)
            step = 1 if view.layout == "single" else view.batch
            for start in range(0, len(pairs), step):
                found += _batch(network, view, pairs[start : start + step])
        return found


def _seen(model: Model, view: View, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)[view.drop :]
    if view.prefix:
        from validation.faults.models import tokenizer

        before = tokenizer(model.path)(view.prefix, add_special_tokens=False)["input_ids"]
        first = ids[:1] if model.bos is not None and ids[:1] == [model.bos] else []
        ids = [*first, *before, *ids[len(first) :]]
    return ids


def _batch(network: Any, view: View, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Floats]:
    ids, places, positions, allowed = _inputs(view, pairs)
    positions = _positions(view.positions, positions)
    if view.window:
        at = torch.arange(ids.shape[1])
        allowed = allowed & (at[:, None] - at < view.window)
    # A row that sees nothing is a padding row; it may see itself.
    allowed = allowed | torch.eye(ids.shape[1], dtype=torch.bool)
    dtype = network.dtype
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
    output = network.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    head = network.get_output_embeddings()
    found = []
    for (prompt, response), (row, start) in zip(pairs, places, strict=True):
        begin = start + len(prompt) - 1
        states = output.last_hidden_state[row, begin : begin + len(response)]
        logits = head(states).float()
        chosen = _logprobs(view, logits, torch.tensor(response), [*prompt, *response], len(prompt))
        found.append(chosen.double().numpy())
    return found


def _inputs(
    view: View, pairs: Sequence[tuple[list[int], list[int]]]
) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Ids `[B, L]`, row and start of each sequence, position ids `[B, L]`, what attention may see `[B, L, L]`."""
    wholes = [[*prompt, *response] for prompt, response in pairs]
    if view.layout.startswith("packed"):
        length = sum(map(len, wholes))
        owner = torch.tensor([i for i, whole in enumerate(wholes) for _ in whole])
        starts = [sum(map(len, wholes[:i])) for i in range(len(wholes))]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if view.layout == "packed":
            causal &= owner[:, None] == owner
        positions = torch.cat([torch.arange(len(whole)) for whole in wholes])
        ids = torch.tensor([[i for whole in wholes for i in whole]])
        return ids, [(0, start) for start in starts], positions[None], causal[None]
    left = view.layout.startswith("left")
    longest = max(len(prompt) for prompt, _ in pairs)
    before = [longest - len(prompt) if left else 0 for prompt, _ in pairs]
    length = max(pad + len(whole) for pad, whole in zip(before, wholes, strict=True))
    ids = torch.tensor(
        [[0] * pad + whole + [0] * (length - pad - len(whole)) for pad, whole in zip(before, wholes, strict=True)]
    )
    positions = torch.arange(length)[None].expand(len(wholes), -1)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None].repeat(len(wholes), 1, 1)
    if view.layout != "left-attended":
        for row, pad in enumerate(before):
            allowed[row, :, :pad] = False
    return ids, list(enumerate(before)), positions, allowed


def _positions(change: str, positions: Tensor) -> Tensor:
    kind, _, number = change.partition(":")
    if kind == "bf16":
        return positions.bfloat16().float()
    if kind == "clip":
        return positions.clamp(max=int(number))
    if kind == "half":
        edge = int(number)
        return torch.where(positions > edge, edge + (positions - edge) / 2, positions.float())
    if kind == "divide":
        return positions.float() / float(number)
    return positions


def _logprobs(view: View, logits: Tensor, targets: Tensor, whole: Sequence[int], first: int) -> Tensor:
    """`[R]` from logits `[R, V]`."""
    if view.cap:
        logits = view.cap * torch.tanh(logits / view.cap)
    if view.decode != (1.0, 0.0, 0.0):
        logits = _penalised(logits, view.decode, whole, first)
    if view.temperature != 1:
        logits = logits / view.temperature
    at = targets[:, None]
    if view.keep:
        kind, _, number = view.keep.partition(":")
        logits = truncated(logits, kind, float(number), at)
    if view.extra_rows:
        logits = torch.cat([logits, torch.zeros(len(logits), view.extra_rows)], 1)
    if view.softmax == "rounded":
        return logits.bfloat16().log_softmax(-1).gather(1, at)[:, 0].float()
    if view.softmax == "subtracted":
        low = logits.bfloat16()
        return (low.gather(1, at)[:, 0] - low.logsumexp(-1)).float()
    wide = logits.double()
    return wide.gather(1, at)[:, 0] - wide.logsumexp(-1)


def truncated(logits: Tensor, kind: str, number: float, at: Tensor) -> Tensor:
    """Logits `[R, V]` with −inf outside of the kept set, to which the tokens `at` `[R, 1]` belong in any case."""
    if kind == "top_k":
        keep = logits >= logits.topk(int(number), -1).values[:, -1:]
    elif kind == "min_p":
        keep = logits >= logits.amax(-1, keepdim=True) + np.log(number)
    else:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before < number)
    return logits.masked_fill(~keep.scatter(1, at, True), -torch.inf)


def _penalised(logits: Tensor, decode: tuple[float, float, float], whole: Sequence[int], first: int) -> Tensor:
    """As vLLM: repetition counts prompt and output, presence and frequency the output alone."""
    repetition, presence, frequency = decode
    logits = logits.clone()
    for t in range(len(logits)):
        seen = torch.tensor(sorted(set(whole[: first + t])))
        values = logits[t, seen]
        logits[t, seen] = torch.where(values > 0, values / repetition, values * repetition)
        counts = torch.bincount(torch.tensor(whole[first : first + t], dtype=torch.long), minlength=logits.shape[1])
        logits[t] -= frequency * counts + presence * (counts > 0)
    return logits


def _changes(network: Any, view: View) -> Iterator[Any]:
    """Contexts in which the network computes otherwise."""
    layers = _layers(network)
    if view.dropout:
        yield _hooked([layer.mlp for layer in layers], lambda x: nn.functional.dropout(x, view.dropout))
    if view.bits:
        yield _hooked(layers, lambda x: rounded(x, view.bits))
    if view.rope:
        yield _rotated(network.get_decoder().rotary_emb, view.rope)
    if view.sink is not None:
        yield _sunk(network, view.sink)
    if view.attention != "sdpa":
        yield _attending(network, view.attention)


def _layers(network: Any) -> list[nn.Module]:
    decoder = network.get_decoder()
    return list(decoder.layers if hasattr(decoder, "layers") else decoder.h)


def rounded(x: Tensor, bits: int) -> Tensor:
    """So many explicit mantissa bits, to nearest."""
    mantissa, exponent = torch.frexp(x.float())
    scale = 2.0 ** (bits + 1)
    return torch.ldexp((mantissa * scale).round() / scale, exponent).to(x.dtype)


@contextmanager
def _hooked(modules: Sequence[nn.Module], change: Any) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rotated(rotary: Any, change: str) -> Iterator[None]:
    before = rotary.inv_freq
    kind, _, number = change.partition(":")
    size = 2 * len(before)
    if kind == "theta":
        new = float(number) ** (-torch.arange(0, size, 2).float() / size)
    elif kind == "yarn":
        # Slow frequencies are divided, fast ones kept; between 1 and 32 turns within 256 positions a ramp.
        turns = 256 * before.float() / (2 * np.pi)
        keep = ((turns - 1) / 31).clamp(0, 1)
        new = before * (keep + (1 - keep) / float(number))
    else:
        new = torch.ones_like(before)
    rotary.inv_freq = new.to(before)
    try:
        yield
    finally:
        rotary.inv_freq = before


@contextmanager
def _attending(network: Any, name: str) -> Iterator[None]:
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")


@contextmanager
def _sunk(network: Any, sink: float) -> Iterator[None]:
    """Attention whose softmax has one more logit, of value zero in the output."""
    from transformers import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * rest.get("scaling", query.shape[-1] ** -0.5)
        scores = (scores + mask).float()
        wider = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), sink)], -1)
        share = wider.softmax(-1)[..., :-1].to(query.dtype)
        return (share @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("bench_sink", attention)
    with _attending(network, "bench_sink"):
        yield
