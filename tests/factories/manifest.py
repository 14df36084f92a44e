"""A manifest, and records of passes."""

from __future__ import annotations

from typing import Any

from mismatch_probe.config import CompareConfig, Sizes
from mismatch_probe.results.manifest import (
    Determinism,
    Environment,
    Machine,
    Manifest,
    ModelRecord,
    PassRecord,
    PromptsRecord,
)


def make_pass(**changes: Any) -> PassRecord:
    """A finished pass."""
    return PassRecord(**({"status": "finished"} | changes))


def make_manifest(**changes: Any) -> Manifest:
    """A run on a CPU that has begun; `config` and `sizes` may be dicts of what differs."""
    config, sizes = changes.pop("config", {}), changes.pop("sizes", {})
    defaults = Sizes(4, 1, 8, rollout_batch=4, self_noise_tokens=0, memory_budget_gib=1.0)
    return Manifest(
        **Manifest.stamp(),
        **{
            "status": "running",
            "created": "2026-01-01T00:00:00+0000",
            "config": config if isinstance(config, CompareConfig) else CompareConfig(**config),
            "sizes": sizes if isinstance(sizes, Sizes) else Sizes(**(vars(defaults) | sizes)),
            "device": "cpu",
            "model": ModelRecord(name="smollm2-135m", path="/models/smollm2-135m", files={"a.safetensors": "ab" * 32}),
            "prompts": PromptsRecord(source="built-in", n=4, sha256="cd" * 32),
            "environment": Environment(versions={"torch": "2.9"}, machine=Machine(cpu="x", cores=2), variables={}),
            **changes,
        },
    )


def finished_manifest(**changes: Any) -> Manifest:
    """A complete run with one pass that finished and one that the engine does not run."""
    counts = {"n_sequences": 64, "n_tokens": 10_240, "n_nonfinite": 0, "n_truncated": 12, "n_empty": 1, "n_dropped": 2}
    passes = {
        "vllm-bfloat16-decode": make_pass(
            counts=counts, deterministic=Determinism(promised=False, why="batches form by arrival")
        ),
        "vllm-float16-decode": make_pass(status="unsupported", why="float16 overflows in this model"),
    }
    return make_manifest(**({"status": "complete", "passes": passes} | changes))
