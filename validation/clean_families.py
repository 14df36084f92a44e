"""Does `attribute` leave unaltered models alone? Tiny random models of many families, in real vLLM and transformers.

vLLM runs each model and its inside is traced, then the trainer's is compared with it. The two have the same weights, so
that nothing but rounding should be between them: the verdict ought to be "no single layer". Where it is not, the two
implementations differ. Sequences are longer than the sliding windows.

    python validation/clean_families.py
    python validation/clean_families.py --families cohere2,bloom --dtypes float32
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mismatch_probe.engines.faults import first_line
from tests.real.tiny import ARCHITECTURES, COMMON, GPT2, GROUPED, save_model
from validation.planted_faults import Trainer, trace

TOKENS = 96
_WINDOW = {"sliding_window": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = ARCHITECTURES | {
    "apertus": ("ApertusConfig", GROUPED),
    "bloom": ("BloomConfig", {**COMMON, "n_layer": 3, "n_head": 4}),
    "cohere": ("CohereConfig", {**COMMON, "num_key_value_heads": 2, "logit_scale": 1.0}),
    "exaone4": ("Exaone4Config", {**GROUPED, **_WINDOW}),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **_WINDOW, "query_pre_attn_scalar": 32}),
    "glm4": ("Glm4Config", GROUPED),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", {**GPT2, "multi_query": True}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, **_WINDOW, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoeConfig",
        {**COMMON, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "mistral": ("MistralConfig", {**GROUPED, **_WINDOW}),
    "nemotron": ("NemotronConfig", GROUPED),
    "olmo3": ("Olmo3Config", {**COMMON, **_WINDOW, "num_key_value_heads": 4}),
    "olmoe": ("OlmoeConfig", {**COMMON, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}),
    "persimmon": ("PersimmonConfig", COMMON),
    "phi": ("PhiConfig", {**COMMON, "num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {**COMMON, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**COMMON, "num_key_value_heads": 2}),
    "smollm3": ("SmolLM3Config", GROUPED),
    "starcoder2": ("Starcoder2Config", {**COMMON, "num_key_value_heads": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(sorted(FAMILIES)))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    options = parser.parse_args()
    for family in options.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = save_model(*FAMILIES[family], Path(folder) / "model")
            for dtype in options.dtypes.split(","):
                print(f"{family:<12} {dtype:<9} {_verdict(checkpoint, dtype, Path(folder) / dtype)}", flush=True)


def _verdict(checkpoint: Path, dtype: str, folder: Path) -> str:
    try:
        trace(checkpoint, dtype, folder / "trace", TOKENS)
        found = Trainer(checkpoint, dtype, folder / "trace").locate()
    except Exception as error:  # one family that does not run leaves the others
        return f"not run: {first_line(error)}"
    where = f": {'what reaches ' if found.kind == 'between' else ''}{found.name}" if found.name else ""
    return f"{found.verdict}{where}, largest score {found.score:.3g}"


if __name__ == "__main__":
    main()
