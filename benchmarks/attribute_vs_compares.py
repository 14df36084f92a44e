"""What `attribute` costs against a comparison of its own for every setting.

Only settings that `compare` has options for take part. Both sides start from nothing and end with their reports.

    python benchmarks/attribute_vs_compares.py
    python benchmarks/attribute_vs_compares.py --num-prompts 16 --max-tokens 12
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import mismatch_probe

# By the setting's name in `attribute`, what `compare` is given for it.
SETTINGS: dict[str, dict[str, Any]] = {
    "rollout:batch-1": {"rollout_batch": 1},
    "rollout:kv-fp8": {"engine_args": {"kv_cache_dtype": "fp8"}},
    "rollout:float16": {"rollout_dtypes": ("float16",)},
    "trainer:attention-eager": {"trainer_attn": "eager"},
    "trainer:layout-single": {"trainer_layout": "single"},
    "trainer:layout-packed": {"trainer_layout": "packed"},
    "trainer:autocast": {"trainer_modes": ("autocast",)},
    "trainer:float16": {"trainer_dtypes": ("float16",)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    size: dict[str, Any] = {
        "model": options.model,
        "num_prompts": options.num_prompts,
        "max_tokens": options.max_tokens,
        "self_noise_tokens": 0,
    }
    pair: dict[str, Any] = {"rollout_dtypes": ("bfloat16",), "trainer_dtypes": ("bfloat16",)}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        mismatch_probe.attribute(**size, out=Path(folder) / "attribute", settings=tuple(SETTINGS), layers=False)
        together = time.perf_counter() - started
        print(f"attribute, {len(SETTINGS)} settings: {together:.0f} s", flush=True)
        apart = 0.0
        for name, change in SETTINGS.items():
            started = time.perf_counter()
            out = Path(folder) / name.replace(":", "-")
            mismatch_probe.compare(**{**size, **pair, **change}, out=out)
            seconds = time.perf_counter() - started
            apart += seconds
            print(f"compare, {name}: {seconds:.0f} s", flush=True)
    print(f"{len(SETTINGS)} comparisons: {apart:.0f} s; attribute / comparisons: {together / apart:.2f}")


if __name__ == "__main__":
    main()
