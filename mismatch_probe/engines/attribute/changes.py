"""Changes to a trainer's model that last for a while: modules in FP32, attention, an FP8 round trip, routes.

All of them work on the model object of transformers, by module names and classes, and put everything back.

A router of transformers answers with (logits, weights, indices). What makes weights out of logits differs between
architectures, so it is found by trying: the rule that gives a router's own weights from its own logits and indices.

Shape legend: `N` tokens of a pass, `B` sequences of it, `T` tokens of the longest, `E` experts, `K` experts of a token,
`L` layers with a router.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.attribute.variants import UNKNOWN, NotThereError
from mismatch_probe.engines.audit.places import Network, is_norm, is_router
from mismatch_probe.engines.patching import replaced_forward

_MLP = re.compile(r"mlp|ffn|feed_forward|moe|^fc\d|^fc_", re.IGNORECASE)
_FP8 = torch.float8_e4m3fn
Attention = Callable[..., Any]
Rule = Callable[[Tensor, Tensor], Tensor]


def modules_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Modules by name."""
    return [model.get_submodule(name) for name in names]


def mlp_blocks(model: nn.Module) -> list[nn.Module]:
    """The MLP or the experts of each layer."""
    return [
        child
        for layer in modules_of(model, Network.of(model).layers)
        for name, child in layer.named_children()
        if _MLP.search(name) and not is_norm(child)
    ]


@contextmanager
def in_fp32(model: nn.Module, classes: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
    """Runs classes of modules in FP32, each of which takes what it is given up and hands its result back in `dtype`.

    Args:
        model: A causal language model of transformers.
        classes: Of `variants.FP32_CLASSES`.
        dtype: What the rest computes in.

    Raises:
        NotThereError: The model has no such modules.
    """
    with ExitStack() as stack:
        for name in classes:
            stack.enter_context(_CLASSES[name](model, dtype))
        yield


@contextmanager
def _norms(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """All norms, those of queries and keys included, their product with the weight, too (Llama's makes it in dtype)."""
    with _whole([module for module in model.modules() if is_norm(module)], dtype, "norm"):
        yield


@contextmanager
def _mlp(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    with _whole(mlp_blocks(model), dtype, "MLP"):
        yield


@contextmanager
def _attention(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """q·k, softmax and their product with v; the projections stay."""
    if str(model.config._attn_implementation).startswith("flash"):  # type: ignore[union-attr]
        raise NotThereError("FlashAttention does not support FP32")

    def wide(function: Attention) -> Attention:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(mask, Tensor) and mask.is_floating_point():
                mask = mask.float()
            with _no_autocast(query):
                found = function(module, query.float(), key.float(), value.float(), mask, *args, **kwargs)
            return (found[0].to(dtype), *found[1:])

        return call

    with attention_changed(model, wide):
        yield


@contextmanager
def _rope(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cosines and sines stay in FP32, and with them the rotation; queries and keys are rounded once, after it."""
    modules = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    if not modules:
        raise NotThereError("the model has no separate rotary-embedding module")

    def narrow(function: Attention) -> Attention:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, _with_wide_input(module)))
        stack.enter_context(attention_changed(model, narrow))
        yield


def _with_wide_input(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.float(), *args, **kwargs)  # it answers in the dtype that it is given

    return call


@contextmanager
def _residual(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The stream between the layers' blocks in FP32; every block still reads and makes what it does in dtype."""
    network = Network.of(model)
    if not network.layers:
        raise NotThereError("the decoder layers were not found")
    layers = modules_of(model, network.layers)
    norms = [child for layer in layers for child in layer.children() if is_norm(child)]
    norms += [child for child in model.get_decoder().children() if is_norm(child)]  # type: ignore[operator]
    blocks = [child for layer in layers for child in layer.children() if not is_norm(child)]
    blocks += modules_of(model, [network.head] if network.head else [])

    def states_in(kind: torch.dtype) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # The states alone: angles and masks that come with them are none of the stream.
            states = {key: _cast(value, kind) for key, value in kwargs.items() if key == "hidden_states"}
            return _cast(args[:1], kind) + args[1:], kwargs | states

        return hook

    handles = [layers[0].register_forward_pre_hook(states_in(torch.float32), with_kwargs=True)]
    handles += [block.register_forward_pre_hook(states_in(dtype), with_kwargs=True) for block in blocks]
    try:
        # Norms read the stream, which they must not round first, whatever their class does with wide input.
        with _whole(norms, dtype, "norm of the stream"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _head(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The head alone, its logits left in FP32; weights that it shares with the embedding are copied for it."""
    name = Network.of(model).head
    if not name:
        raise NotThereError("the LM head was not found")
    (head,) = modules_of(model, [name])
    wide = copy.deepcopy(head).float()

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _no_autocast(x):
            # Not through its hooks, which another change may have put there and the copy has, too.
            return type(head).forward(wide, x.float(), *args, **kwargs)

    with replaced_forward(head, call):
        yield


_CLASSES: dict[str, Callable[[nn.Module, torch.dtype], AbstractContextManager[None]]] = {
    "norms": _norms,
    "attention": _attention,
    "rope": _rope,
    "mlp": _mlp,
    "residual": _residual,
    "head": _head,
}


@contextmanager
def _whole(modules: Sequence[nn.Module], dtype: torch.dtype, what: str) -> Iterator[None]:
    """Modules with their weights in FP32; `dtype` is what they hand back, where they would not hand back FP32 anyway.

    Weights and buffers come back as they were, tensor by tensor: some architectures keep a few in FP32.
    """
    if not modules:
        raise NotThereError(f"the model has no separate {what} module")
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(tensors_kept(module))
            module.float()
            stack.enter_context(replaced_forward(module, _wide(module, dtype)))
        yield


@contextmanager
def tensors_kept(module: nn.Module) -> Iterator[None]:
    """Whatever happens to a module's dtypes meanwhile, its parameters and buffers are the same tensors afterwards."""
    parameters = [(p, p.data) for p in module.parameters()]
    buffers = [(owner, name, b) for owner in module.modules() for name, b in owner.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def _wide(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with _no_autocast(tensors[0]):
            output = forward(*_cast(args, torch.float32), **{k: _cast(v, torch.float32) for k, v in kwargs.items()})
        # Under autocast a norm's weights are FP32, and what it gives, too.
        keep = is_norm(module) and torch.is_autocast_enabled(tensors[0].device.type)
        return output if keep else _cast(output, dtype)

    return call


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, also inside of tuples; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(tensor.device.type, enabled=False)


@contextmanager
def kv_through_fp8(model: nn.Module) -> Iterator[None]:
    """Keys and values as an FP8 cache with scale 1 hands them to attention (vLLM's default without calibration)."""

    def rounded(function: Attention) -> Attention:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(module, query, _through_fp8(key), _through_fp8(value), *args, **kwargs)

        return call

    with attention_changed(model, rounded):
        yield


def _through_fp8(tensor: Tensor) -> Tensor:
    top = torch.finfo(_FP8).max
    return tensor.clamp(-top, top).to(_FP8).to(tensor.dtype)


@contextmanager
def attention_changed(model: nn.Module, change: Callable[[Attention], Attention]) -> Iterator[None]:
    """Wraps the function that the model's layers call for attention.

    Raises:
        NotThereError: On the way out, where no layer has called it: the architecture computes attention by itself.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, calls = model.config._attn_implementation, 0  # type: ignore[union-attr]
    module = sys.modules[type(model).__module__]

    def counted(function: Attention) -> Attention:
        changed = change(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return changed(*args, **kwargs)

        return call

    eager = getattr(module, "eager_attention_forward", None)
    if name == "eager" and eager is None:
        raise NotThereError(f"{type(model).__name__} has its own eager attention, which cannot be replaced")
    before = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if before is None:
        module.eager_attention_forward = counted(eager)  # type: ignore[attr-defined, arg-type]
    else:
        ALL_ATTENTION_FUNCTIONS[name] = counted(before)
    try:
        yield
    finally:
        if before is None:
            module.eager_attention_forward = eager  # type: ignore[attr-defined]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = before
    if not calls:
        raise NotThereError(f"{type(model).__name__} has its own attention, which cannot be replaced")


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """Another attention implementation for the while.

    Raises:
        NotThereError: The model or the installation does not have it.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise NotThereError(str(error).splitlines()[0]) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """The decoder under torch.compile for the while."""
    decoder = model.get_decoder()
    with replaced_forward(decoder, torch.compile(decoder.forward, dynamic=True)):
        yield


def _softmax(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.float().softmax(-1).gather(1, indices)


def _sigmoid(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.float().sigmoid().gather(1, indices)


def _normalised(rule: Rule) -> Rule:
    def call(logits: Tensor, indices: Tensor) -> Tensor:
        weights = rule(logits, indices)
        return weights / weights.sum(-1, keepdim=True)

    return call


# A softmax over the chosen ones alone is the normalised softmax.
_RULES: tuple[Rule, ...] = (_softmax, _normalised(_softmax), _sigmoid, _normalised(_sigmoid))


class Routing:
    """What every router chose in one forward pass, and what it shall choose instead.

    Args:
        model: A causal language model of transformers.
        chosen: Experts of a token.
    """

    def __init__(self, model: Any, chosen: int) -> None:
        names = Network.of(model).layers
        self._routers: dict[int, Any] = {}
        for index, layer in enumerate(modules_of(model, names)):
            for name, module in layer.named_modules():
                if is_router(name):
                    self._routers.setdefault(index, module)
        if not self._routers:
            raise NotThereError("the model has no routers")
        self._chosen = chosen
        self._wanted: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    @property
    def layers(self) -> Sequence[int]:
        """Indices of the layers that have a router."""
        return tuple(self._routers)

    @contextmanager
    def watching(self) -> Iterator[Routing]:
        """Routers answer through this for the while; `seen` has `[N, K]` indices by layer, of the last pass."""
        handles = [router.register_forward_hook(self._after(layer)) for layer, router in self._routers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def choose(self, wanted: dict[int, Tensor]) -> None:
        """From now on: by layer `[N, K]` indices of the next pass's tokens, `UNKNOWN` where a token keeps its own."""
        self._wanted = wanted

    def _after(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            at, indices = self._parts(output)
            self.seen[layer] = indices.detach()
            wanted = self._wanted.get(layer)
            if wanted is None:
                return None
            logits, weights = output[0], output[at[0]]
            rule = _rule(logits, weights, indices)
            # The same experts keep their order, and with it the bits of the sum over them.
            own = (wanted == UNKNOWN) | same_experts(wanted, indices)[:, None]
            routes = torch.where(own, indices, wanted)
            changed = list(output)
            changed[at[0]], changed[at[1]] = rule(logits, routes).to(weights.dtype), routes
            return tuple(changed)

        return hook

    def _parts(self, output: Any) -> tuple[tuple[int, int], Tensor]:
        """Where weights and indices lie in a router's answer, and the indices.

        Raises:
            NotThereError: It is built in another way.
        """
        parts = list(output) if isinstance(output, tuple) else []
        shaped = [
            i for i, t in enumerate(parts) if i and isinstance(t, Tensor) and t.ndim == 2 and t.shape[1] == self._chosen
        ]
        indices = [i for i in shaped if not parts[i].is_floating_point()]
        weights = [i for i in shaped if parts[i].is_floating_point()]
        if len(indices) != 1 or len(weights) != 1:
            raise NotThereError("the routers do not return logits, weights and indices")
        return (weights[0], indices[0]), parts[indices[0]]


@torch.no_grad()
def _rule(logits: Tensor, weights: Tensor, indices: Tensor) -> Rule:
    """How the router made its weights: the rule that comes closest.

    Raises:
        NotThereError: In no way that is known.
    """
    apart = [float((rule(logits, indices) - weights.float()).abs().max()) for rule in _RULES]
    if not min(apart) <= 8 * torch.finfo(weights.dtype).eps:
        raise NotThereError("the router's weighting of experts is not supported")
    return _RULES[apart.index(min(apart))]


def same_experts(one: Tensor, other: Tensor) -> Tensor:
    """`[…]` whether two `[…, K]` routes name the same experts, in whatever order."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1)


def padded_routes(routes: Sequence[NDArray[np.int16]], device: torch.device | str) -> Tensor:
    """`[L, B, T, K]` routes `[L, T, K]` of sequences side by side, padded on the right with `UNKNOWN`."""
    layers, _, chosen = routes[0].shape
    found = torch.full((layers, len(routes), max(one.shape[1] for one in routes), chosen), UNKNOWN)
    for index, one in enumerate(routes):
        found[:, index, : one.shape[1]] = torch.from_numpy(one.astype(np.int64))
    return found.to(device)
