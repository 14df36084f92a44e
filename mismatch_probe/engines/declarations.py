"""Declarations of a `config.json` that one of the engines ignores or reads in its own way.

Found by reading vLLM 0.32.0 and transformers 5.19.0. Each row has the evidence: a file, and a pattern that it has
or does not have. A test looks the evidence up in what is installed, so that a row which is no longer true is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Side = Literal["vLLM", "transformers"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Where it was read: a file of a package, and a pattern that it has, or has not."""

    package: Literal["vllm", "transformers"]
    file: str
    pattern: str
    has: bool = False


@dataclass(frozen=True)
class Declaration:
    """A declaration that one side does not follow.

    Attributes:
        key: In `config.json`.
        model_types: Whose.
        side: The side that departs from it.
        does: What that side does: `ignores`, `shifts` (reads it by one), `refuses`.
        applies: Whether the configuration declares it, and so that it matters.
        beyond: The key whose value a sequence must exceed for it to matter, in tokens; empty where it always matters.
        attention: Attention of transformers under which it matters, empty for all; None is transformers' own choice.
        evidence: Where it was read.
        versions: What it was read in.
    """

    key: str
    model_types: tuple[str, ...]
    side: Side
    does: Literal["ignores", "shifts", "refuses"]
    applies: Callable[[Config], bool]
    evidence: tuple[Evidence, ...]
    beyond: str = ""
    attention: tuple[str | None, ...] = ()

    @property
    def versions(self) -> str:
        return "vLLM 0.32.0, transformers 5.19.0"


def _set(key: str, *neutral: object) -> Callable[[Config], bool]:
    return lambda config: config.get(key) not in (None, False, *neutral)


def _mixed_windows(config: Config) -> bool:
    layers, full = config.get("num_hidden_layers", 0), config.get("max_window_layers", 28)
    return bool(config.get("use_sliding_window")) and not config.get("layer_types") and 0 < full < layers


def _untied_reader(model_type: str, file: str) -> Declaration:
    return Declaration(
        "tie_word_embeddings",
        (model_type,),
        "vLLM",
        "ignores",
        _set("tie_word_embeddings"),
        (Evidence("vllm", f"model_executor/models/{file}.py", r"tie_w|lm_head = self\.model\.embed"),),
    )


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "clip_qkv",
        ("olmoe",),
        "vLLM",
        "ignores",
        _set("clip_qkv"),
        (
            Evidence("vllm", "model_executor/models/olmoe.py", "clip_qkv"),
            Evidence("transformers", "models/olmoe/modeling_olmoe.py", r"clamp_\(min=-self\.config\.clip", has=True),
        ),
    ),
    Declaration(
        "attn_logit_softcapping",
        ("gemma2",),
        "transformers",
        "ignores",
        lambda config: config.get("attn_logit_softcapping", 50.0) is not None,
        (
            Evidence("transformers", "integrations/sdpa_attention.py", "softcap"),
            Evidence("vllm", "model_executor/models/gemma2.py", r"attn_logits_soft_cap=config\.attn", has=True),
        ),
        attention=(None, "sdpa"),
    ),
    Declaration(
        "logit_scale",
        ("llama", "granite"),
        "transformers",
        "ignores",
        _set("logit_scale", 1, 1.0),
        (
            Evidence("transformers", "models/llama/modeling_llama.py", "logit_scale"),
            Evidence("transformers", "models/granite/modeling_granite.py", "logit_scale"),
            Evidence("vllm", "model_executor/models/llama.py", r'getattr\(config, "logit_scale", 1\.0\)', has=True),
            Evidence("vllm", "model_executor/models/granite.py", r'getattr\(config, "logit_scale", 1\.0\)', has=True),
        ),
    ),
    Declaration(
        "sliding_window",
        ("llama", "granite", "stablelm"),
        "transformers",
        "ignores",
        lambda config: bool(config.get("sliding_window")) and not config.get("layer_types"),
        (
            Evidence("transformers", "models/llama/modeling_llama.py", "sliding_window"),
            Evidence("transformers", "models/granite/modeling_granite.py", "sliding_window"),
            Evidence("transformers", "models/stablelm/modeling_stablelm.py", "sliding_window"),
            Evidence("vllm", "engine/arg_utils.py", r"sliding_window = model_config\.get_sliding_window\(\)", has=True),
        ),
        beyond="sliding_window",
    ),
    Declaration(
        "sliding_window",
        ("qwen2_moe",),
        "vLLM",
        "ignores",
        _set("use_sliding_window"),
        (
            Evidence("vllm", "model_executor/models/qwen2_moe.py", "sliding_window"),
            Evidence("vllm", "engine/arg_utils.py", "layer_types is None or all", has=True),
        ),
        beyond="sliding_window",
    ),
    Declaration(
        "use_sliding_window",
        ("qwen2", "qwen3"),
        "vLLM",
        "refuses",
        _mixed_windows,
        (
            Evidence(
                "vllm", "model_executor/models/qwen2.py", "Sliding window for some but all layers is not", has=True
            ),
        ),
    ),
    Declaration(
        "sliding_window",
        ("cohere2",),
        "vLLM",
        "shifts",
        _set("sliding_window"),
        (Evidence("vllm", "model_executor/models/commandr.py", r"config\.sliding_window \+ 1", has=True),),
        beyond="sliding_window",
    ),
    Declaration(
        "rope_scaling",
        ("phi3",),
        "vLLM",
        "shifts",
        lambda config: rope_type(config) == "longrope",
        (
            Evidence(
                "vllm",
                "model_executor/layers/rotary_embedding/phi3_long_rope_scaled_rope.py",
                "use_long_rope = max_model_len > original",
                has=True,
            ),
        ),
        beyond="original_max_position_embeddings",
    ),
    Declaration(
        "attention_bias",
        ("cohere", "cohere2", "gemma", "granitemoe", "olmoe"),
        "vLLM",
        "ignores",
        _set("attention_bias"),
        tuple(
            Evidence("vllm", f"model_executor/models/{file}.py", "attention_bias")
            for file in ("commandr", "gemma", "granitemoe", "olmoe")
        ),
    ),
    Declaration(
        "tie_word_embeddings",
        ("gptj",),
        "vLLM",
        "refuses",
        _set("tie_word_embeddings"),
        (Evidence("vllm", "model_executor/models/gpt_j.py", r"assert not config\.tie_word_embeddings", has=True),),
    ),
    _untied_reader("olmoe", "olmoe"),
    _untied_reader("deepseek_v2", "deepseek_v2"),
    _untied_reader("deepseek_v3", "deepseek_v2"),
    _untied_reader("glm4_moe", "glm4_moe"),
    _untied_reader("glm4_moe_lite", "glm4_moe_lite"),
    _untied_reader("gpt_oss", "gpt_oss"),
    _untied_reader("jamba", "jamba"),
    _untied_reader("minimax_m2", "minimax_m2"),
    _untied_reader("nemotron_h", "nemotron_h"),
    _untied_reader("qwen3_next", "qwen3_next"),
)


def rope_type(config: Config) -> str:
    """The kind of RoPE scaling, `default` where there is none; of older names the present one."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = (found.get("rope_type") or found.get("type") or "default") if isinstance(found, Mapping) else "default"
    return {"su": "longrope", "mrope": "default"}.get(str(kind), str(kind))


@dataclass(frozen=True)
class Known:
    """What an installed engine says it knows, read from its source so that nothing has to be imported.

    Attributes:
        names: Architectures (vLLM), model types (transformers).
        rope_types: Kinds of RoPE scaling.
        borrowed: Architectures that vLLM runs by transformers' own code.
    """

    names: frozenset[str]
    rope_types: frozenset[str]
    borrowed: frozenset[str] = frozenset()


@cache
def known_to_vllm() -> Known | None:
    """None where vLLM is not installed or its source reads otherwise."""
    models = _source("vllm", "model_executor/models/registry.py")
    names = frozenset(re.findall(r'^\s+"(\w+)":\s*\(', models, re.MULTILINE))
    rope = _source("vllm", "model_executor/layers/rotary_embedding/__init__.py")
    kinds = set(re.findall(r'scaling_type == "(\w+)"', rope))
    for listed in re.findall(r"scaling_type in \[([^\]]*)\]", rope):
        kinds |= set(re.findall(r'"(\w+)"', listed))
    borrowed = frozenset(re.findall(r'^\s+"(\w+)":\s*\(\s*"transformers"', models, re.MULTILINE))
    return Known(names, frozenset(kinds), borrowed) if names and kinds else None


@cache
def known_to_transformers() -> Known | None:
    """None where transformers is not installed or its source reads otherwise."""
    found = _source("transformers", "models/auto/auto_mappings.py")
    names = frozenset(re.findall(r'^\s+\("([\w\-]+)", "\w+Config"\)', found, re.MULTILINE))
    table = _source("transformers", "modeling_rope_utils.py").partition("ROPE_INIT_FUNCTIONS: ")[2].partition("\n}")[0]
    kinds = set(re.findall(r'^\s+"(\w+)":', table, re.MULTILINE))
    return Known(names, frozenset(kinds | {"default"})) if names and kinds else None


def _source(package: str, file: str) -> str:
    spec = find_spec(package)  # of a package without a parent nothing is imported
    if spec is None or not spec.submodule_search_locations:
        return ""
    try:
        return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
    except OSError:
        return ""


def holds(evidence: Evidence) -> bool | None:
    """Whether the evidence is there in what is installed; None where the file is not."""
    text = _source(evidence.package, evidence.file)
    return None if not text else bool(re.search(evidence.pattern, text)) == evidence.has
