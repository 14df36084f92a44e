"""Does preflight raise false alarms? A small random checkpoint of every family that transformers and vLLM both know.

A family is an architecture of `AutoModelForCausalLM` that vLLM's registry lists. Its configuration is transformers'
default made small; transformers saves it, and preflight reads what was saved. Every finding above `info` is printed: it
is true of the family, or a false alarm.

    python validation/preflight_families.py
    python validation/preflight_families.py --families llama,gemma2
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mismatch_probe.engines.declarations import known_to_vllm
from mismatch_probe.engines.faults import first_line
from mismatch_probe.engines.models import resolve
from mismatch_probe.probes.preflight import Use
from mismatch_probe.probes.preflight.run import preflight
from mismatch_probe.prompts import load_prompts
from mismatch_probe.report.words import say
from mismatch_probe.results.finding import Finding
from tests.real.tiny import VOCABULARY, save_tokenizer

_LARGEST = 20_000_000
USE = Use(prompts=load_prompts(None, 64).prompts, max_tokens=32, device="cpu", bytes_per_weight=4)
# Values of sizes that make a model small, by the names that configurations have for them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_config_hidden"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels"), 16),
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "rotary_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "word_embed_proj_dim": 64,
    "sliding_window": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}


def families() -> dict[str, str]:
    """Architecture by model type, of those that both engines know."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    vllm = known_to_vllm()
    assert vllm is not None, "vLLM is not installed"
    names = vllm.names - vllm.borrowed
    every = {kind: (one,) if isinstance(one, str) else one for kind, one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return {kind: found[0] for kind, one in every.items() if (found := [name for name in one if name in names])}


def save_family(kind: str, folder: Path) -> None:
    """Writes a small checkpoint of a model type."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    why: Exception = ValueError("names of its sizes are not known")
    for config in _small_configs(CONFIG_MAPPING[kind]):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        except Exception as error:  # a size does not fit the others
            why = error
            continue
        if size <= _LARGEST:
            break
    else:
        raise why
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)


# Sizes that some configurations compute by themselves, or have none of.
_LEFT_OUT = ((), ("head_dim",), ("num_hidden_layers",), ("head_dim", "num_hidden_layers"), ("sliding_window",))


def _small_configs(kind: Any) -> Iterator[Any]:
    """The default made small, in several ways."""
    default = kind()
    names = default.to_dict()
    for known in ({name for name, value in names.items() if value is not None}, names.keys()):
        given = {name: value for name, value in SMALL.items() if name in known}
        for part in ("text_config", "vision_config", "audio_config"):
            if (inner := getattr(default, part, None)) is not None:
                given[part] = next(_small_configs(type(inner))).to_dict()
        for left_out in _LEFT_OUT:
            with suppress(Exception):
                yield kind(**{name: value for name, value in given.items() if name not in left_out})


def findings_of(folder: Path) -> list[Finding]:
    """What preflight finds above `info`."""
    return [finding for finding in preflight(resolve(str(folder)), USE).findings if finding.severity != "info"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    for kind in options.families.split(",") if options.families else sorted(families()):
        folder = Path(tempfile.mkdtemp())
        try:
            save_family(kind, folder)
        except Exception as error:  # one family that cannot be made leaves the others
            outcomes["not made"] += 1
            print(f"{kind:<24} not made: {first_line(error)[:120]}", flush=True)
            continue
        else:
            found = findings_of(folder)
            outcomes["with findings" if found else "clean"] += 1
            print(f"{kind:<24} {'clean' if not found else ''}", flush=True)
            for finding in found:
                print(f"  {finding.severity} {finding.code} {finding.where}: {say(finding)}")
        finally:
            shutil.rmtree(folder)
    print(", ".join(f"{n} {what}" for what, n in outcomes.items()))


if __name__ == "__main__":
    main()
