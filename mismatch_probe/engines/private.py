"""Every private part of vLLM and transformers that this package depends on, and whether the installed version has it.

A part is private where its package promises nothing of it: an attribute behind a public object, a module that is not in
the documentation, a field by whose name something is read. `python -m mismatch_probe.engines.private` prints what has
moved. Nothing here imports either package: their sources are read.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

READ_IN = {"vllm": "0.32.0", "transformers": "5.19.0"}
"""Versions whose sources were read."""


@dataclass(frozen=True)
class Part:
    """A private part.

    Attributes:
        module: Where it is, e.g. `vllm.v1.engine.llm_engine`.
        name: What is used of the module: a function, class or constant; `Class.member` for a method, property or
            field; `function(argument)`; or `"KEY"` for an entry of a dictionary.
        used_by: The module of this package that depends on it, below `mismatch_probe`.
        why: What for.
    """

    module: str
    name: str
    used_by: str
    why: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


_ENGINE = "engines.vllm.engine"
_PROCESSORS = "engines.vllm.processors"
_WEIGHTS = "engines.vllm.weights"
_HOOKS = "engines.vllm.hooks"
_SETTINGS = "engines.vllm.settings"
_CHANGES = "engines.attribute.changes"
_LLM, _LLM_ENGINE = "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine"
_RELOAD = "vllm.model_executor.model_loader.reload"
_V1_LOGITS, _V2_LOGITS = "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor.interface"

PARTS = (
    # Requests go to the engine one by one, so that all are in it at once and each step's tokens are seen.
    Part(_LLM, "LLM.llm_engine", _ENGINE, "requests are added and stepped without LLM.generate"),
    Part(_LLM, "LLM.renderer", _ENGINE, "makes an engine's input of token ids"),
    Part("vllm.renderers.base", "BaseRenderer.render_cmpl", _ENGINE, "makes an engine's input of token ids"),
    Part(_LLM, "LLM.reset_prefix_cache", _ENGINE, "answers whether the cache is empty"),
    Part(_LLM, "LLM.sleep(level)", _ENGINE, "level 0 pauses the scheduler, so that a running core admits all at once"),
    Part(_LLM, "LLM.wake_up(tags)", _ENGINE, "the tag scheduling lets it go on"),
    Part(_LLM, "LLM.collective_rpc", _ENGINE, "runs a function in the workers"),
    Part(_LLM, "LLM.apply_model", _ENGINE, "runs a function on the model where it is"),
    Part(_LLM_ENGINE, "LLMEngine.add_request", _ENGINE, "adds a request"),
    Part(_LLM_ENGINE, "LLMEngine.step", _ENGINE, "makes a step"),
    Part(_LLM_ENGINE, "LLMEngine.has_unfinished_requests", _ENGINE, "ends the steps"),
    Part(_LLM_ENGINE, "LLMEngine.vllm_config", _ENGINE, "the whole configuration, for identity"),
    Part(_LLM_ENGINE, "LLMEngine.engine_core", _ENGINE, "is shut down at the end"),
    Part("vllm.config.vllm", "VllmConfig.use_v2_model_runner", _ENGINE, "which interface logits processors must have"),
    Part("vllm.config.vllm", "set_current_vllm_config", _ENGINE, "transformers' classes that vLLM changed are built"),
    Part("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _ENGINE, "the configuration before the engine"),
    Part("vllm.engine.arg_utils", "EngineArgs.enable_trace_replay", _ENGINE, "Model Runner V2 replays tokens itself"),
    Part("vllm.sampling_params", "SamplingParams.trace_decode_token_ids", _ENGINE, "the tokens of a replay"),
    Part("vllm.sampling_params", "SamplingParams.flat_logprobs", _ENGINE, "log-probs as lists, the sampled ones first"),
    Part("vllm.sampling_params", "SamplingParams.extra_args", _ENGINE, "what a request wants of the processors"),
    Part("vllm.sampling_params", "RequestOutputKind", _ENGINE, "each step gives its own tokens alone"),
    Part("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.attn_groups", _ENGINE, "names of attention backends"),
    Part("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.attn_groups", _ENGINE, "the same of Model Runner V2"),
    Part("vllm.v1.worker.utils", "AttentionGroup.backend", _ENGINE, "names of attention backends"),
    # Logits processors of both model runners.
    Part(_V1_LOGITS, "AdapterLogitsProcessor.new_req_logits_processor", _PROCESSORS, "a function per request"),
    Part(_V1_LOGITS + ".interface", "LogitsProcessor.is_argmax_invariant", _PROCESSORS, "greedy ones are seen, too"),
    Part(_V2_LOGITS, "LogitsProcessor.add_request", _PROCESSORS, "a request's slot"),
    Part(_V2_LOGITS, "LogitsProcessor.apply", _PROCESSORS, "rows of a step"),
    Part(_V2_LOGITS, "LogitsContext.idx_mapping_np", _PROCESSORS, "which slot a row is of"),
    Part(_V2_LOGITS, "LogitsContext.seq_lens_upper_bound_np", _PROCESSORS, "how many tokens a row sees"),
    Part("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank", _PROCESSORS, "one rank writes rows"),
    Part("vllm.distributed.parallel_state", "model_parallel_is_initialized", _PROCESSORS, "one rank writes rows"),
    # Reload of weights in place.
    Part(f"{_RELOAD}.layerwise", "initialize_layerwise_reload", _WEIGHTS, "begins a reload"),
    Part(f"{_RELOAD}.layerwise", "finalize_layerwise_reload", _WEIGHTS, "ends it"),
    Part(f"{_RELOAD}.layerwise", "get_layerwise_info", _WEIGHTS, "what a layer was given"),
    Part(f"{_RELOAD}.meta", "materialize_layer", _WEIGHTS, "empty tensors become real ones"),
    Part(f"{_RELOAD}.types", "LayerReloadingInfo.load_numel", _WEIGHTS, "own loaders count as loaded"),
    Part(f"{_RELOAD}.types", "LayerReloadingInfo.load_numel_total", _WEIGHTS, "the same"),
    Part(f"{_RELOAD}.types", "LayerReloadingInfo.can_load", _WEIGHTS, "the same"),
    Part(
        "vllm.model_executor.layers.fused_moe.modular_kernel",
        "FusedMoEExperts.process_weights_after_loading",
        _WEIGHTS,
        "experts that prepare their weights do so for a layer's first kernel only",
    ),
    Part(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "MoERunner._combined_gate_weight",
        _WEIGHTS,
        "joined gates are kept from the old weights",
    ),
    Part("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.sinks", _WEIGHTS, "sinks are kept in a dtype"),
    Part("vllm.config.vllm", "set_current_vllm_config", _WEIGHTS, "layers are prepared again"),
    # Hooks.
    Part("vllm.model_executor.models.interfaces", "SupportsQuant.packed_modules_mapping", _HOOKS, "fused modules"),
    Part("vllm.model_executor.models.llama", "LlamaForCausalLM.compute_logits", _HOOKS, "logits of the last states"),
    Part("vllm.model_executor.models.llama", "LlamaForCausalLM.forward(input_ids)", _HOOKS, "the ids of a step"),
    Part("vllm.model_executor.models.llama", "LlamaForCausalLM.forward(positions)", _HOOKS, "where sequences begin"),
    Part("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.input_batch", _HOOKS, "requests of a step, in order"),
    Part("vllm.v1.worker.gpu_input_batch", "InputBatch.req_ids", _HOOKS, "their names"),
    Part("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.query_start_loc", _HOOKS, "where their rows begin"),
    Part("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", _HOOKS, "the same of Model Runner V2"),
    Part("vllm.v1.worker.gpu.input_batch", "InputBatch.query_start_loc_np", _HOOKS, "the same of Model Runner V2"),
    # Settings.
    Part("vllm.config.model", "_FLOAT16_NOT_SUPPORTED_MODELS", "engines.vllm.unsupported", "no float16 for them"),
    Part("vllm.envs", '"VLLM_ENABLE_V1_MULTIPROCESSING"', _SETTINGS, "the engine core in this process"),
    Part("vllm.envs", '"VLLM_WORKER_MULTIPROC_METHOD"', _SETTINGS, "no forked core holds the pipe open"),
    Part("vllm.envs", '"VLLM_ALLOW_INSECURE_SERIALIZATION"', _SETTINGS, "functions reach a core of its own"),
    Part("vllm.envs", '"VLLM_FLOAT32_MATMUL_PRECISION"', _SETTINGS, "FP32 products without TF32"),
    Part("vllm.engine.arg_utils", "EngineArgs.kv_cache_memory_bytes", _SETTINGS, "a CPU's cache has a size"),
    Part("vllm.engine.arg_utils", "EngineArgs.enable_chunked_prefill", _SETTINGS, "a CPU turns no generator back"),
    Part("vllm.platforms.interface", "Platform.supported_dtypes", "engines.environment", "what `env` shows"),
    # transformers.
    Part("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", _CHANGES, "attention is wrapped"),
    Part("transformers.models.llama.modeling_llama", "eager_attention_forward", _CHANGES, "eager attention is wrapped"),
    Part("transformers.modeling_utils", "PreTrainedModel.set_attn_implementation", _CHANGES, "another attention"),
    Part("transformers.configuration_utils", "PreTrainedConfig._attn_implementation", _CHANGES, "the attention in use"),
    Part("transformers.modeling_utils", "PreTrainedModel.get_experts_implementation", "engines.float64", "put back"),
    Part("transformers.modeling_utils", "PreTrainedModel.set_experts_implementation", "engines.float64", "one by one"),
    Part("transformers.modeling_utils", "PreTrainedModel._is_stateful", "engines.hf.engine", "a state is not packed"),
    Part(
        "transformers.integrations.sdpa_attention",
        "use_gqa_in_sdpa",
        "engines.hf.engine",
        "heads repeat in FP32 on CUDA",
    ),
    Part(
        "transformers.models.llama.modeling_llama", "LlamaForCausalLM.forward(logits_to_keep)", "engines.logprobs", "-"
    ),
    Part(
        "transformers.core_model_loading",
        "revert_weight_conversion",
        "rl.policy",
        "weights by the names of a checkpoint, experts apart",
    ),
)


def moved(part: Part) -> bool:
    """Whether the installed package has no such part any more.

    Raises:
        LookupError: The package is not installed.
    """
    tree = _source(part.module)
    if tree is None:
        return True
    if part.name.startswith('"'):
        key = part.name.strip('"')
        return not any(isinstance(node, ast.Constant) and node.value == key for node in ast.walk(tree))
    path, _, argument = part.name.rstrip(")").partition("(")
    first, *rest = path.split(".")
    found: list[ast.AST] = [node for node in tree.body if first in _names(node)]
    for name in rest:
        found = [node for owner in found if isinstance(owner, ast.ClassDef) for node in _members(owner, name)]
    if argument:
        found = [node for node in found if isinstance(node, ast.FunctionDef) and argument in _arguments(node)]
    return not found


def report() -> Iterator[str]:
    """A line for each part that has moved, and for each package of another version than was read."""
    for package, read in READ_IN.items():
        try:
            installed = next(version(name) for name in (package, f"{package}-cpu") if _installed(name))
        except StopIteration:
            yield f"{package} is not installed."
            continue
        if installed.partition("+")[0] != read:
            yield f"{package} {installed} is installed; {read} was read."
        for part in PARTS:
            if part.package == package and moved(part):
                yield f"{part.module} has no {part.name} any more. mismatch_probe.{part.used_by} needs it: {part.why}."


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


@cache
def _source(module: str) -> ast.Module | None:
    """A module's source, None where there is no such module. Nothing is imported."""
    package, *inner = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]).joinpath(*inner)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.exists() else None


def _names(node: ast.AST) -> set[str]:
    """What a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _members(owner: ast.ClassDef, name: str) -> Iterator[ast.AST]:
    """Where a class binds a member: in its body, or as `self.name`."""
    yield from (node for node in owner.body if name in _names(node))
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store):
            yield node


def _arguments(function: ast.FunctionDef) -> set[str]:
    return {a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}


if __name__ == "__main__":
    lines = list(report())
    print("\n".join(lines) or f"All {len(PARTS)} private parts are where they were.")
    sys.exit(bool(lines))
