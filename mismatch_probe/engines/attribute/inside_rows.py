"""The traced sequences as the trainer's batch, and the engine's records by the trainer's module names.

Shape legend: `S` sequences, `T` tokens of the longest, `R` tokens of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mismatch_probe.engines.attribute.trace import OUTSIDE, TraceFiles
from mismatch_probe.engines.audit.places import Network, layer_index


class Batch:
    """The traced sequences as one padded batch, and rows back and forth."""

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device) -> None:
        longest = max(map(len, sequences))
        self.shape = (len(sequences), longest)
        self.lengths = [len(s) for s in sequences]
        self.mask = (torch.arange(longest) < torch.tensor(self.lengths)[:, None]).to(device)
        padded = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
        self.inputs: dict[str, Any] = {"input_ids": padded, "use_cache": False}
        if not bool(self.mask.all()):
            self.inputs["attention_mask"] = self.mask.long()

    def rows(self, tensor: Tensor) -> Tensor | None:
        """`[R, …]` of a tensor `[S, T, …]` or `[S·T, …]`, on the host; None of any other."""
        count = self.shape[0] * self.shape[1]
        if tensor.shape[:2] != self.shape and (len(tensor) != count or tensor.ndim < 2):
            return None
        flat = tensor.detach().reshape(count, -1)
        return flat[self.mask.flatten()].to("cpu")

    def padded(self, rows: Tensor, like: Tensor) -> Tensor:
        """A tensor shaped and placed as `like`, with `[R, …]` rows in it and 0 in the padding."""
        flat = torch.zeros(self.shape[0] * self.shape[1], rows[0].numel(), dtype=like.dtype, device=like.device)
        flat[self.mask.flatten()] = rows.reshape(len(rows), -1).to(like)
        return flat.reshape(like.shape)

    def by_sequence(self, squares: Tensor) -> NDArray[np.float64]:
        """`[S]` sums of `[R]`."""
        return np.array([float(part.sum()) for part in torch.split(squares, self.lengths)])


class EngineRecords:
    """The engine's records by the trainer's module names; fused ones are cut.

    Args:
        files: The trace.
        network: The trainer's.
        widths: Output width of the trainer's modules with weights.
    """

    def __init__(self, files: TraceFiles, network: Network, widths: Mapping[str, int]) -> None:
        self._files, self._network, self._widths = files, network, widths
        facts = files.facts()
        self._fused: dict[str, list[str]] = facts["fused"]
        self._renamed: list[tuple[str, str]] = facts["renamed"]
        self._part, self._records = "", dict[str, Tensor]()

    def find(self, name: str, side: str) -> Tensor | None:
        """The input or output (`in`, `out`) of a module of the trainer, None where the engine has none like it."""
        layer = layer_index(self._network.layers, name)
        if layer is None:
            self._open(OUTSIDE)
            last = name.rpartition(".")[2]
            return next((t for n, t in self._records.items() if n.split(".")[-2:] == [last, side]), None)
        self._open(f"layer-{layer}")
        relative = name[len(self._network.layers[layer]) :].removeprefix(".")
        for there in dict.fromkeys((relative, *(relative.replace(ours, other) for ours, other in self._renamed))):
            found = self._records.get(f"{there}.{side}")
            found = self._cut(name, there, side) if found is None else found
            if found is not None:
                return found
        return None

    def outside(self, name: str) -> Tensor:
        self._open(OUTSIDE)
        return self._records[name]

    def _cut(self, name: str, relative: str, side: str) -> Tensor | None:
        """A module's part of one that the engine has fused of several."""
        parent, _, last = relative.rpartition(".")
        whole = next((n for n, parts in self._fused.items() if last in parts), None)
        if whole is None:
            return None
        record = self._records.get(f"{parent}.{whole}.{side}" if parent else f"{whole}.{side}")
        if record is None or side == "in":
            return record
        before = name[: len(name) - len(last)]
        widths = [self._widths.get(before + part, 0) for part in self._fused[whole]]
        at = self._fused[whole].index(last)
        if sum(widths) != record.shape[1]:
            return None
        return record[:, sum(widths[:at]) : sum(widths[: at + 1])]

    def _open(self, part: str) -> None:
        if part != self._part:
            with torch._C.DisableTorchFunction():  # a float64 pass would widen what is read
                self._part, self._records = part, self._files.read(part)
