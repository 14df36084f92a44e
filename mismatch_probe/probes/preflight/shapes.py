"""Do the headers say what the configuration says? Names and shapes only; which families follow the plan is listed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding

# Families whose tensors follow the names and shapes of `_planned`, each compared with transformers' own model.
PLANNED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "cohere",
    "cohere2",
    "olmo2",
    "olmoe",
    "smollm3",
    "stablelm",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
_LAYER = re.compile(r"^(?P<before>[\w.]*?)\b(?:layers|h|blocks)\.(?P<index>\d+)\.(?P<rest>.+)$")
_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|encoder|mtp|draft|projector")
_EMBEDDING = re.compile(r"^(?:\w+\.){0,3}(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"^(?:\w+\.)?(?:lm_head|embed_out)\.weight$")
_LAYER_COUNT = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_BLOCK_LISTS = ("layers_block_type", "hybrid_override_pattern", "block_configs", "num_layers_per_stack")
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$")
_EXPERT = re.compile(r"\.experts\.")


def _planned(config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...] | None]:
    """Shapes by the name of a layer's tensor, with `#` for the number of an expert; None where any is right."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    wide = config.get("intermediate_size")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    groups = config.get("num_key_value_heads") or heads
    q = heads * size if heads and size else None
    kv = groups * size if groups and size else None
    both = q + 2 * kv if q and kv else None
    experts = config.get("num_experts") or config.get("num_local_experts")
    narrow = config.get("moe_intermediate_size") if "qwen" in str(config.get("model_type")) else wide
    shared = config.get("shared_expert_intermediate_size")
    shapes: dict[str, tuple[int | None, ...] | None] = {
        "self_attn.qkv_proj.weight": (both, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.o_proj.bias": (hidden,),
        "mlp.gate_up_proj.weight": (2 * wide if wide else None, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "mlp.down_proj.bias": (hidden,),
        "mlp.gate.weight": (experts, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        "mlp.experts.#.down_proj.weight": (hidden, narrow),
        "mlp.experts.gate_up_proj": None,
        "mlp.experts.down_proj": None,
        "block_sparse_moe.gate.weight": (experts, hidden),
        "block_sparse_moe.experts.#.w1.weight": (wide, hidden),
        "block_sparse_moe.experts.#.w2.weight": (hidden, wide),
        "block_sparse_moe.experts.#.w3.weight": (wide, hidden),
    }
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes |= {f"self_attn.{name}_proj.weight": (rows, hidden), f"self_attn.{name}_proj.bias": (rows,)}
        shapes |= {f"self_attn.{name}_norm.weight": None, f"self_attn.{name}_layernorm.weight": None}
        shapes |= {f"self_attn.{name}_layernorm.norms.#.weight": None}
    for name in ("gate", "up"):
        shapes |= {f"mlp.{name}_proj.weight": (wide, hidden), f"mlp.{name}_proj.bias": (wide,)}
        shapes[f"mlp.shared_expert.{name}_proj.weight"] = (shared, hidden)
        shapes[f"mlp.experts.#.{name}_proj.weight"] = (narrow, hidden)
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes |= {f"{name}_layernorm.{part}": (hidden,) for part in ("weight", "bias")}
    return shapes


@check("shapes", needs=("tensors",))
def shapes(subject: Subject) -> Iterator[Finding]:
    """Shapes of embedding, head and, of families that are known, every tensor of a layer."""
    config, tensors = subject.config, subject.checkpoint.tensors
    wrong: list[tuple[str, tuple[int, ...], tuple[int | None, ...], str]] = []
    vocabulary, hidden = config.get("vocab_size"), config.get("hidden_size")
    planned = _planned(config) if subject.model_type in PLANNED else {}
    for name, tensor in tensors.items():
        wanted: tuple[int | None, ...] | None = None
        if _EMBEDDING.match(name) or _HEAD.match(name):
            if not _OTHER_TOWERS.search(name) and len(tensor.shape) == 2:
                wanted = (vocabulary, hidden if planned else None)
        elif planned and (match := _LAYER.match(name)) and not _OTHER_TOWERS.search(match["before"]):
            wanted = planned.get(re.sub(r"\.\d+\.", ".#.", match["rest"]))
        if wanted is not None and not _fits(tensor.shape, wanted):
            wrong.append((name, tensor.shape, wanted, tensor.file))
    if wrong:
        name, shape, planned_shape, file = wrong[0]
        shown = {"found": _text(shape), "wanted": _text(planned_shape)}
        yield found("shape-differs", "fail", name, file=file, tensors=len(wrong), **shown)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))


def _text(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


@check("layers", needs=("tensors",))
def layers(subject: Subject) -> Iterator[Finding]:
    """Layers that are missing, or that the configuration does not count."""
    counts = {subject.config[key] for key in _LAYER_COUNT if isinstance(subject.config.get(key), int)}
    if len(counts) != 1 or any(key in subject.config for key in _BLOCK_LISTS):
        return  # some families count halves of layers or passes through them, or name each one
    (declared,) = counts
    towers: dict[str, set[int]] = defaultdict(set)
    for name in subject.checkpoint.tensors:
        match = _LAYER.match(name)
        if match and not _OTHER_TOWERS.search(match["before"]):
            towers[match["before"]].add(int(match["index"]))
    if not towers:
        return
    indices = max(towers.values(), key=len)
    missing = [index for index in range(declared) if index not in indices]
    if missing:
        yield found("layers-missing", "fail", missing=len(missing), first=missing[0], declared=declared)
    more = sum(index >= declared for index in indices)
    if more:
        # Layers that predict further tokens stand behind the others in files of some families.
        expected = int(subject.config.get("num_nextn_predict_layers") or 0) >= more
        yield found("layers-unused", "info" if expected else "warn", layers=more, declared=declared)


@check("names", needs=("tensors",))
def names(subject: Subject) -> Iterator[Finding]:
    """Of families that are known: tensors that are missing, and tensors that neither engine loads."""
    if subject.model_type not in PLANNED or subject.model.text_config is not subject.model.config:
        return
    tensors, planned = subject.checkpoint.tensors, _planned(subject.config)
    declared = int(subject.config.get("num_hidden_layers") or 0)
    known: dict[int, set[str]] = defaultdict(set)
    unknown: list[str] = []
    for name in tensors:
        match = _LAYER.match(name)
        if match and match["before"] == "model." and int(match["index"]) >= declared:
            continue  # `layers` speaks of it
        if match and match["before"] == "model." and re.sub(r"\.\d+\.", ".#.", match["rest"]) in planned:
            known[int(match["index"])].add(match["rest"])
        elif not re.fullmatch(r"model\.(embed_tokens|norm)\.(weight|bias)|lm_head\.(weight|bias)", name):
            unknown += [] if _HARMLESS.search(name) else [name]
    if unknown:
        yield found("tensors-unused", "warn", unknown[0], tensors=len(unknown), file=tensors[unknown[0]].file)
    missing = [name for name in ("model.embed_tokens.weight", "model.norm.weight") if name not in tensors]
    if subject.config.get("tie_word_embeddings") is False and "lm_head.weight" not in tensors:
        missing.append("lm_head.weight")
    for experts in (True, False):
        alike = {i: rest for i, rest in known.items() if any(_EXPERT.search(r) for r in rest) is experts}
        every = {name for rest in alike.values() for name in rest}
        missing += [f"model.layers.{i}.{name}" for i, rest in sorted(alike.items()) for name in sorted(every - rest)]
    if missing:
        yield found("tensors-missing", "fail", missing[0], tensors=len(missing))


@check("head", needs=("tensors",))
def head(subject: Subject) -> Iterator[Finding]:
    """Tied embeddings beside a head of its own. vLLM 0.32 (config/model.py, `maybe_untie_word_embeddings`) and
    transformers 5.19 (modeling_utils.py, `tie_weights`) keep the head where its values differ; others discard it.
    """
    heads = [name for name in subject.checkpoint.tensors if _HEAD.match(name)]
    embedded = any(_EMBEDDING.match(name) for name in subject.checkpoint.tensors)
    if heads and embedded and subject.config.get("tie_word_embeddings") is True:
        yield found("head-tied-and-stored", "warn", heads[0], file=subject.checkpoint.tensors[heads[0]].file)
