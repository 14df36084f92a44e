"""Looks inside vLLM's model while it runs: forward hooks, put there in the worker that holds the model.

Functions of this module travel to the worker by name (`LLM.apply_model`) and keep their state in it. Hooks see nothing
of compiled code or CUDA graphs, so the engine must be eager, and nothing whole of a model that is split over devices.

Most of vLLM's models keep the residual stream in two tensors, which the next norm adds
(`vllm/model_executor/models/llama.py`); the stream is their sum, rounded as that norm rounds it. Some hand on a second
tensor that nobody reads (`commandr.py`, `stablelm.py`): then the norm after it reads the first alone.

Rows of a step belong to whatever the scheduler put there. Whole sequences are told apart by positions that start again
at 0, and recognised by their ids; what is being sampled has no ids yet, and the model runner says whose rows are whose.

Shape legend: `N` tokens of a step, `R` tokens of all traced sequences, `K` experts of a token, `L` layers with routers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.attribute.trace import OUTSIDE, Routers, TraceFiles, TraceRequest
from mismatch_probe.engines.attribute.variants import UNKNOWN
from mismatch_probe.engines.audit.places import is_norm, is_router, layer_index
from mismatch_probe.errors import EngineError

# Blocks that vLLM calls otherwise than transformers.
_RENAMED = (("mlp", "block_sparse_moe"), ("mlp", "feed_forward"))
_OTHER_TOWER = re.compile(r"vision|visual|audio|image", re.IGNORECASE)
# Ends the name of what a stream's second part is kept as.
_SECOND = "+"
_state: dict[str, Any] = {}


class _Rows:
    """Which rows of each step belong to which wanted sequence."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._open = {index: list(ids) for index, ids in enumerate(sequences)}
        self.found: list[tuple[int, int, int]] = []  # sequence, first row and end among all rows that were kept
        self.index: Tensor | None = None
        self._kept = self._tokens = 0

    def step(self, ids: Tensor, positions: Tensor) -> None:
        """Reads a step's ids and positions `[N]`."""
        rows: list[int] = []
        known = ids.tolist()
        self._tokens = len(known)
        places = (positions[0] if positions.ndim > 1 else positions).tolist()
        starts = [row for row, place in enumerate(places) if place == 0]
        for start in starts:
            match = next((s for s, wanted in self._open.items() if known[start : start + len(wanted)] == wanted), None)
            if match is None:
                continue
            length = len(self._open.pop(match))
            rows += range(start, start + length)
            self.found.append((match, self._kept, self._kept + length))
            self._kept += length
        self.index = torch.tensor(rows, device=ids.device) if rows else None

    def take(self, tensor: Tensor) -> Tensor | None:
        """The step's rows of a tensor `[N, …]`, `[1, N, …]` or `[N · heads, …]`, on the host, copied: kernels write in
        place.
        """
        if tensor.shape[:2] == (1, self._tokens):  # transformers' own modules, which vLLM can run, too
            tensor = tensor[0]
        if self.index is None or len(tensor) % self._tokens:
            return None
        return tensor.detach().reshape(self._tokens, -1).index_select(0, self.index).to("cpu", copy=True)

    def order(self) -> Tensor:
        """`[R]` where each row lies among what was kept, sequences in their order.

        Raises:
            EngineError: The engine did not run some sequence in one piece.
        """
        if self._open:
            raise EngineError(
                f"vLLM split {len(self._open)} sequences into chunks, or did not pass their ids to the model.",
                "Use --no-layers.",
            )
        return torch.cat([torch.arange(first, end) for _, first, end in sorted(self.found)])


class _DecodedRows:
    """Which token of which request each row of a step is, as the engine samples them.

    Requests are numbered as `VllmRollout` names them, `RUN-NUMBER`, which vLLM adds to. Model Runner V2 keeps a batch
    only while a step is prepared; V1 keeps one for good.

    Args:
        runner: vLLM's model runner, which knows the make-up of its batch.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self._tokens = runner, 0
        self._prepared: Any = None
        self._steps: list[tuple[list[int], NDArray[np.int64], Tensor]] = []
        self._modern = hasattr(runner, "prepare_inputs")
        if self._modern:
            runner.prepare_inputs = self._noting(runner.prepare_inputs)

    def close(self) -> None:
        """Leaves the runner as it was."""
        if self._modern:
            del self._runner.prepare_inputs

    def _noting(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._prepared = prepare(*args, **kwargs)
            return self._prepared

        return call

    def _batch(self) -> tuple[list[str], NDArray[np.int64]]:
        """Names of the step's requests in the order of their rows, and where each begins, the end last."""
        batch = self._prepared if self._modern else self._runner.input_batch
        names = list(batch.req_ids)
        starts = batch.query_start_loc_np if self._modern else self._runner.query_start_loc.np
        return names, np.array(starts[: len(names) + 1], np.int64)

    def step(self, ids: Tensor, positions: Tensor) -> None:
        """Reads a step's positions `[N]`, which may be padded."""
        names, starts = self._batch()
        self._tokens = int(starts[-1])
        places = (positions[0] if positions.ndim > 1 else positions)[: self._tokens]
        self._steps.append(([int(name.split("-")[1]) for name in names], np.diff(starts), places.clone()))

    def take(self, tensor: Tensor) -> Tensor:
        """The step's rows of a tensor `[N, W]` or `[1, N, W]`, where they lie."""
        return tensor.detach().reshape(-1, tensor.shape[-1])[: self._tokens]

    def order(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """`[R]` where each token's row lies among what was kept, -1 where it has none, as the last one sampled.

        A beginning that came out of the prefix cache has the rows of the request that computed it.
        """
        places = [np.full(len(ids), -1) for ids in sequences]
        ends = np.cumsum([len(positions) for _, _, positions in self._steps])
        # Backwards: a request that was preempted ran its tokens again, and the first time is when it sampled them.
        for (numbers, counts, positions), end in zip(reversed(self._steps), ends[::-1], strict=True):
            rows, at = np.arange(end - len(positions), end), positions.cpu().numpy()
            for number, part in zip(numbers, np.split(np.arange(len(at)), np.cumsum(counts)[:-1]), strict=True):
                places[number][at[part]] = rows[part]
        for own, ids in zip(places, sequences, strict=True):
            cached = int((own >= 0).argmax())
            shared = (p for p, s in zip(places, sequences, strict=True) if s[:cached] == ids[:cached] and p[0] >= 0)
            own[:cached] = next(shared, own)[:cached]
        return torch.from_numpy(np.concatenate(places))


class Tracer:
    """Keeps inputs and outputs of modules.

    Args:
        model: vLLM's.
        request: What to keep.
    """

    def __init__(self, model: nn.Module, request: TraceRequest) -> None:
        self._model, self._request = model, request
        self._rows = _Rows(request.sequences)
        self._kept: dict[str, dict[str, list[Tensor]]] = {}
        self._norms: set[tuple[str, str]] = set()
        names = layer_names(model, request.layers)
        self._handles = [model.register_forward_pre_hook(_step(self._rows), with_kwargs=True)]
        self._handles.append(model.register_forward_hook(self._after(OUTSIDE, "final", model)))
        for name, module in model.named_modules():
            layer = layer_index(names, name)
            part, relative = (OUTSIDE, name) if layer is None else (f"layer-{layer}", name[len(names[layer]) :])
            own = bool(list(module.parameters(recurse=False)))
            direct = layer is not None and relative.count(".") <= 1
            if name and name != "lm_head" and (own or direct or relative.endswith(".experts")):
                self._watch(module, part, relative.removeprefix("."))

    def finish(self) -> None:
        """Takes the hooks away, and writes what they kept."""
        for handle in self._handles:
            handle.remove()
        order, files = self._rows.order(), TraceFiles(self._request.folder)
        joined = {
            part: {name: torch.cat(found)[order] for name, found in records.items() if found}
            for part, records in self._kept.items()
        }
        rows = joined[OUTSIDE]["final.out"][list(self._request.logit_rows)]
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            joined[OUTSIDE]["logits"] = self._model.compute_logits(rows.to(device)).to("cpu")  # type: ignore[operator]
        _join_streams(joined, self._norms)
        for part, records in joined.items():
            files.write(part, records)
        fused = getattr(self._model, "packed_modules_mapping", None) or {}
        files.write_facts(self._request, fused, _RENAMED)

    def _watch(self, module: nn.Module, part: str, name: str) -> None:
        self._handles.append(module.register_forward_pre_hook(self._before(part, name, module), with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._after(part, name, module)))

    def _before(self, part: str, name: str, module: nn.Module) -> Callable[..., None]:
        in_parts = _reads_stream(name, module)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = _floats((*args, *kwargs.values()))
            if tensors:
                self._keep(part, f"{name}.in", tensors[0])
            if in_parts and _in_parts(tensors):
                self._keep(part, f"{name}.in{_SECOND}", tensors[1])

        return hook

    def _after(self, part: str, name: str, module: nn.Module) -> Callable[..., None]:
        in_parts = _reads_stream(name, module)
        if is_norm(module):
            self._norms.add((part, name))
        # Experts that add the shared ones to their own have no counterpart; the block around them has.
        shared = getattr(module, "shared_experts", None) is not None and name.endswith("experts")

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = _floats(output if isinstance(output, (tuple, list)) else (output,))
            if tensors and not shared:
                self._keep(part, f"{name}.out", tensors[0])
            if in_parts and _in_parts(tensors):
                self._keep(part, f"{name}.out{_SECOND}", tensors[1])

        return hook

    def _keep(self, part: str, name: str, tensor: Tensor) -> None:
        taken = self._rows.take(tensor)
        if taken is not None:
            self._kept.setdefault(part, {}).setdefault(name, []).append(taken)


def _step(rows: _Rows | _DecodedRows) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        if ids is not None and positions is not None:
            rows.step(ids, positions)

    return hook


def _floats(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _reads_stream(name: str, module: nn.Module) -> bool:
    """Whether a module, by its name in its layer, is one that can get and give the stream in two parts."""
    return name == "" or is_norm(module)


def _in_parts(tensors: Sequence[Tensor]) -> bool:
    """Whether these can be a stream in two parts."""
    return len(tensors) > 1 and tensors[0].shape == tensors[1].shape


def _join_streams(joined: dict[str, dict[str, Tensor]], norms: set[tuple[str, str]]) -> None:
    """Makes one of what was kept in two parts: first what norms read, then what layers read and made."""
    for part, name in norms:
        records = joined.get(part, {})
        second, returned = (records.pop(f"{name}.{end}{_SECOND}", None) for end in ("in", "out"))
        if second is None or returned is None:  # the second of a norm that returns one tensor is a gate
            continue
        # A norm that adds returns the sum as it rounded it, one that does not its second argument.
        if not torch.equal(second, returned) or not records[f"{name}.in"].any():
            records[f"{name}.in"] = returned
    layers = [records for part, records in joined.items() if part != OUTSIDE]  # in the order of their calls
    unread, handed_on = _second_part_is_unread(layers), False
    for records in layers:
        entering, leaving = (records.pop(f"{end}{_SECOND}", None) for end in (".in", ".out"))
        # What enters beside a stream that was handed on whole is something else (Zamba2's embedding).
        if entering is not None and handed_on and not unread:
            records[".in"] = records[".in"] + entering
        if leaving is not None and not unread:
            records[".out"] = records[".out"] + leaving
        handed_on = leaving is not None


def _second_part_is_unread(layers: Sequence[dict[str, Tensor]]) -> bool:
    """Whether layers hand on a second part that the next one does not take, or does not add to the first."""
    for before, after in pairwise(layers):
        second, first = before.get(f".out{_SECOND}"), before.get(".out")
        if second is None or first is None or not second.any():
            continue
        # Records are in the order in which modules were called.
        entry = next((records for name, records in after.items() if name.endswith(".in") and name != ".in"), None)
        if f".in{_SECOND}" not in after or (entry is not None and torch.equal(entry, first)):
            return True
    return False


def layer_names(model: nn.Module, count: int) -> list[str]:
    """Names of the decoder layers: the list of so many modules.

    Raises:
        EngineError: There is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _OTHER_TOWER.search(name):
            return [f"{name}.{index}" for index in range(count)]
    raise EngineError("The decoder layers of vLLM's model were not found.", "Use --no-layers.")


class RouteTracer:
    """Keeps which experts the routers chose.

    Args:
        model: vLLM's.
        rows: Which rows of a step are kept.
        routers: Of the model.
    """

    def __init__(self, model: nn.Module, rows: _Rows | _DecodedRows, routers: Routers) -> None:
        self._rows, self._routers = rows, routers
        self._kept: dict[int, list[Tensor]] = {}
        self._handles = [model.register_forward_pre_hook(_step(rows), with_kwargs=True)]
        for index, name in enumerate(layer_names(model, routers.layers)):
            for inner, module in model.get_submodule(name).named_modules():
                if is_router(inner):
                    self._handles.append(module.register_forward_hook(self._after(index)))

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    @property
    def ran(self) -> bool:
        """Whether a router did."""
        return bool(self._kept)

    def found(self, order: Tensor) -> dict[str, Any]:
        """What was kept, with its types taken off, since vLLM's processes do not carry them: `layers`, their indices;
        `routes`, the bytes of int16 `[L, R, K]` experts of each token, the likeliest first, `UNKNOWN` where two experts
        tie for the last place; `shape`.

        Args:
            order: `[R]` rows of what was kept; -1 for `UNKNOWN`.
        """
        layers = sorted(self._kept)
        if not self.ran:
            raise EngineError("No router ran in vLLM's model.", "Report this architecture.")
        unknown = torch.full((1, self._routers.chosen), UNKNOWN, dtype=torch.int16)
        routes = torch.stack([torch.cat([*(t.cpu() for t in self._kept[layer]), unknown])[order] for layer in layers])
        return {"layers": layers, "shape": list(routes.shape), "routes": routes.numpy().tobytes()}

    def _after(self, layer: int) -> Callable[..., None]:
        experts, chosen = self._routers.experts, self._routers.chosen

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found = [t for t in _floats(output if isinstance(output, tuple) else (output,)) if t.shape[-1] == experts]
            taken = self._rows.take(found[0].float()) if found else None
            if taken is None:
                return
            values, indices = taken.topk(min(chosen + 1, experts))
            routes = indices[:, :chosen].short()
            if chosen < experts:  # 16-bit logits tie, and which expert a tie goes to is the kernel's own affair
                routes[values[:, chosen - 1] == values[:, chosen]] = UNKNOWN
            self._kept.setdefault(layer, []).append(routes)

        return hook


def start_trace(request: TraceRequest, model: nn.Module) -> None:
    """Begins a trace in this worker."""
    _state["trace"] = Tracer(model, request)


def finish_trace(model: nn.Module) -> None:
    """Ends it."""
    _state.pop("trace").finish()


def start_routes(sequences: Sequence[Sequence[int]], routers: Routers, model: nn.Module) -> None:
    """Begins to keep the routes of whole sequences in this worker."""
    rows = _Rows(sequences)
    _state["routes"] = rows, RouteTracer(model, rows, routers)


def finish_routes(model: nn.Module) -> dict[str, Any]:
    """Ends it, see `RouteTracer.found`."""
    rows, tracer = _state.pop("routes")
    tracer.remove()
    found: dict[str, Any] = tracer.found(rows.order())
    return found


def start_decoded_routes(worker: Any, routers: Routers) -> None:
    """Begins to keep the routes of tokens as they are sampled, in this worker; not where no layers are found."""
    runner = model_runner(worker)
    rows = _DecodedRows(runner)
    try:
        _state["decoded"] = rows, RouteTracer(runner.get_model(), rows, routers)
    except EngineError:
        rows.close()


def finish_decoded_routes(worker: Any, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Ends it, see `RouteTracer.found`; rows of all `sequences`, prompts and responses, in the order of requests.
    Empty where no router ran.
    """
    if "decoded" not in _state:
        return {}
    rows, tracer = _state.pop("decoded")
    tracer.remove()
    rows.close()
    found: dict[str, Any] = tracer.found(rows.order(sequences)) if tracer.ran else {}
    return found


def model_runner(worker: Any) -> Any:
    """The model runner of a worker of vLLM's, whichever of its wrappers is given."""
    return getattr(worker, "model_runner", None) or worker.worker.model_runner
