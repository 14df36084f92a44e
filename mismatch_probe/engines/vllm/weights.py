"""How new weights get into a model that vLLM runs; all of it happens in the worker that holds the model.

vLLM's own reload puts empty tensors on torch's meta device in the place of every parameter, has each parameter's
`weight_loader` note what it is given, repeats the preparation of the first load on a layer that has all of its weights,
and copies the result into the tensors that the kernels know (vllm/model_executor/model_loader/reload, vLLM 0.32). That
leaves three things behind, each without an error. The line references say where.

- Experts that prepare their weights themselves, on a CPU all of them, do so only for a layer's first kernel
  (layers/fused_moe/unquantized_fused_moe_method.py, `_setup_kernel`): a reload copies weights in the checkpoint's
  layout to where the kernel reads packed ones. Without a kernel the layer is prepared as at first, whatever the
  instruction set and the padding.
- Loaders that write into a parameter themselves (models/gpt_oss.py: experts, sinks) write into the meta device, and the
  layer gets its old weights back. So the empty tensors are real ones here, and such layers are counted as loaded.
- What was computed from weights and kept: attention sinks in another dtype (v1/attention/backends/cpu_attn.py,
  `forward`) and joined gates (layers/fused_moe/runner/moe_runner.py, `_maybe_fuse_gate_weights`).

For the while of a reload the weights are in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_weights(worker: Any, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Replaces the weights of a worker's model in place.

    Args:
        worker: vLLM's.
        weights: By the names of a checkpoint, whole.

    Returns:
        Parameters of vLLM's model that were not loaded, by vLLM's names, sorted; they mean nothing now.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer

    worker = getattr(worker, "worker", worker)
    model = worker.model_runner.get_model()
    wanted = {name for name, _ in model.named_parameters()}
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        _forget(model)
        initialize_layerwise_reload(model)
        for layer in model.modules():
            materialize_layer(layer, get_layerwise_info(layer))
        loaded: set[str] = model.load_weights(iter(weights.items()))
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            if info.can_load() and not info.load_numel and any(f"{name}.{p}" in loaded for p in layer._parameters):
                # As many as make the next call prepare the layer.
                info.load_numel = max(1, info.load_numel_total - 1)
        finalize_layerwise_reload(model, worker.model_runner.model_config)
    return sorted(wanted - loaded)


def _forget(model: Any) -> None:
    """Drops what the model made of its old weights and would keep."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        experts = type(getattr(getattr(method, "moe_kernel", None), "fused_experts", None))
        own = getattr(experts, "process_weights_after_loading", None)
        if own is not None and own is not FusedMoEExperts.process_weights_after_loading:
            method.moe_kernel = None
        if getattr(layer, "_combined_gate_weight", None) is not None:
            layer._combined_gate_weight = None
        sinks = layer._parameters.get("sinks")
        for child in layer.children() if sinks is not None else ():
            if getattr(getattr(child, "impl", None), "sinks", None) is not None:
                child.impl.sinks = sinks
