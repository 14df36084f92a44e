"""A forward pass that is float64 throughout.

Loading a model in float64 is not enough: transformers takes norms, softmax and rotary angles to float32 on purpose,
which helps 16-bit models and cuts a float64 one down, and multiplies all experts at once, which torch does in no
float64. Inside `keep_float64` every such step stays float64, and experts run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _KeepFloat64(TorchFunctionMode):
    """Turns every request for float32 into one for float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(_double(value) for value in args)
        return func(*args, **{name: _double(value) for name, value in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def keep_float64(model: Any) -> Iterator[None]:
    """Float64 in a forward pass of a model of transformers wherever code asks for float32, tensors that are made
    included.
    """
    before, experts = torch.get_default_dtype(), model.get_experts_implementation()
    model.set_experts_implementation("eager")
    torch.set_default_dtype(torch.float64)
    try:
        with _KeepFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
        model.set_experts_implementation(experts)
