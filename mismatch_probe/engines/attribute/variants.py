"""One change to one side, as data: nothing here imports torch.

A *variant* is an engine in one configuration; its *pass* holds the log-probs that it gives the run's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mismatch_probe.types import TrainerDtype, TrainerMode

# How an engine goes over the tokens: `decode` as it sampled them, `prefill` all of a sequence at once; `alone` one
# sequence in the engine at a time; `warm` from the prefix cache that decoding left.
PassKind = Literal["decode", "prefill", "decode-alone", "prefill-alone", "decode-warm"]
# In routes, where two experts tie for the last place.
UNKNOWN = -1
# Classes of a trainer's modules that can run in FP32 for themselves.
FP32_CLASSES = ("norms", "attention", "rope", "mlp", "residual", "head")


@dataclass(frozen=True)
class TrainerVariant:
    """The trainer with a change.

    Attributes:
        name: Unique, also its file's.
        dtype, mode: Where they are not the trainer's own.
        layout: `single`, `padded`, `left-padded`, `packed`, or `rollout`: as the engine's scheduler batches.
        attention: Implementation, by transformers' name.
        fp32: Which of `FP32_CLASSES` run in FP32.
        softmax_in_dtype: The last log-softmax in the compute dtype.
        kv_fp8: Keys and values rounded through FP8 (e4m3) before attention, as an FP8 KV cache rounds them.
        compiled: The decoder under torch.compile.
        tf32: FP32 products in TF32 (CUDA).
        routes: Experts as the engine chose them.
    """

    name: str
    dtype: TrainerDtype | None = None
    mode: TrainerMode | None = None
    layout: str | None = None
    attention: str | None = None
    fp32: tuple[str, ...] = ()
    softmax_in_dtype: bool = False
    kv_fp8: bool = False
    compiled: bool = False
    tf32: bool = False
    routes: bool = False


class NotThereError(Exception):
    """The model has nothing that the change could be made to, or makes it impossible; the text says which."""
