"""Tiny models of real architectures, built from a configuration and a fixed seed; a token is a character."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Large enough that the next token is far from uniform, as a trained model's is.
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {
    **GROUPED,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**GROUPED, "tie_word_embeddings": True}),
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": False}),
    # The one whose head has a bias in both engines.
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 16, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    # vLLM's experts add the shared one to their own.
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", {**COMMON, "num_key_value_heads": 4}),
    # vLLM's layers hand on a second part of the stream that nobody reads.
    "cohere2": (
        "Cohere2Config",
        {
            **GROUPED,
            "logit_scale": 1.0,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "stablelm": ("StableLmConfig", {**COMMON, "num_key_value_heads": 2}),
    # Queries, keys and values are one projection in both engines, each with an order of its own.
    "falcon": ("FalconConfig", {**COMMON, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}),
    # Scored by the trainer only: these change logits behind the head.
    "gemma2": ("Gemma2Config", {**GROUPED, "final_logit_softcapping": 5.0, "sliding_window": 64}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0}),
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 256, "word_embed_proj_dim": 64}),
}


def save_tiny(architecture: str, folder: Path) -> Path:
    """Writes a checkpoint folder and returns it."""
    return save_model(*ARCHITECTURES[architecture], folder)


def save_model(config_class: str, options: dict[str, Any], folder: Path) -> Path:
    """Writes a checkpoint folder of a configuration of transformers and returns it."""
    import torch
    import transformers

    config = getattr(transformers, config_class)(**options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Fresh norms and biases are exactly 1 and 0: shake them, or a mistake in them would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), parameter_name
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c.isprintable()]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
