"""A run in miniature: summary, manifest, curves and worst tokens, complete, hostile and empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest

from mismatch_probe.metrics.curves import BinnedDiff, Ccdf, LengthCurve, PolicyDensity
from mismatch_probe.report.data import Curves, ReportData, WorstToken

if TYPE_CHECKING:
    from collections.abc import Sequence

SCALES = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 5e-6}
HOSTILE = "</td><script>alert(1)</script>\x1b[31m\u202e[bold]|`$x$` &lt; https://evil.example \ud800" + "A" * 500


class CurvesFactory(Protocol):
    def __call__(self, dtypes: Sequence[str] = ..., *, scale: float = ..., longest: int = ...) -> Curves: ...


class SummaryFactory(Protocol):
    def __call__(self, dtypes: Sequence[str] = ..., *, modes: Sequence[str] = ...) -> dict[str, Any]: ...


def _curves(dtypes: Sequence[str] = tuple(SCALES), *, scale: float = 1.0, longest: int = 300) -> Curves:
    curves = Curves()
    rng = np.random.default_rng(0)
    edges = np.linspace(0.0, 1.0, 11)
    for dtype in dtypes:
        size = SCALES[dtype] * scale
        counts = np.diag(np.arange(1, 11)) + np.eye(10, k=1, dtype=np.int64) * 3
        curves.density[dtype] = PolicyDensity(edges, counts, int(counts.sum()))
        length = np.linspace(20, longest, 12).astype(np.int64)
        ratio = rng.normal(0.0, 10.0 * size, 12) if size else np.zeros(12)
        slope = -2.0 * size
        curves.length[dtype] = LengthCurve(length, ratio, slope, 0.1 * size, (1.5 * slope, 0.5 * slope), "")
        points = np.geomspace(size / 100, size * 30, 20) if size else np.empty(0)
        curves.ccdf[dtype] = Ccdf(points, np.geomspace(1.0, 1e-3, len(points)) if size else np.empty(0))
        curves.by_probability[dtype] = _binned(np.array([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]), size)
        curves.by_position[dtype] = _binned(np.linspace(0, longest, 6).round(), size)
    return curves


def _binned(edges: np.ndarray[tuple[int], np.dtype[np.float64]], size: float) -> BinnedDiff:
    mean = size * np.linspace(2.0, 0.2, len(edges) - 1)
    low, high = mean * 0.8, mean * 1.25
    low[-1] = high[-1] = np.nan
    return BinnedDiff(edges[:-1], edges[1:], np.full(len(mean), 50), mean, low, high)


def _null(pass_id: str, value: float) -> dict[str, Any]:
    return {
        "pass_id": pass_id,
        "null_pass": f"{pass_id}-null",
        "engine": pass_id.split("-", maxsplit=1)[0],
        "dtype": "bfloat16",
        "n_tokens": 1024,
        "n_sequences": 64,
        "n_diverged_sequences": 3,
        "mean_abs_logprob_diff": value,
        "max_abs_logprob_diff": 10 * value,
    }


def _pair(rollout: str, trainer: str, mode: str) -> dict[str, Any]:
    size = max(SCALES[rollout], SCALES[trainer])
    return {
        "rollout_pass": f"vllm-{rollout}-decode",
        "trainer_pass": f"hf-{trainer}-{mode}",
        "rollout_dtype": rollout,
        "trainer_dtype": trainer,
        "trainer_mode": mode,
        "on_policy": True,
        "n_tokens": 10_240,
        "n_sequences": 64,
        "n_prompts": 64,
        "n_nonfinite": 0,
        "metrics": {
            "mean_abs_logprob_diff": {"value": size, "ci_low": 0.9 * size, "ci_high": 1.1 * size},
            "max_abs_logprob_diff": {"value": 30 * size, "ci_low": None, "ci_high": None},
            "kl_k3": {"value": size**2, "ci_low": 0.8 * size**2, "ci_high": 1.3 * size**2},
            "ess_seq": {"value": 0.93, "ci_low": 0.9, "ci_high": 0.95},
            "pareto_k": {"value": None, "ci_low": None, "ci_high": None, "why": "fewer than 200 sequences"},
        },
        "null": {"rollout": _null(f"vllm-{rollout}", 1.2e-4 if rollout == "bfloat16" else 0.0), "trainer": None},
    }


def _summary(dtypes: Sequence[str] = tuple(SCALES), *, modes: Sequence[str] = ("cast",)) -> dict[str, Any]:
    pairs = [_pair(rollout, trainer, mode) for rollout in dtypes for trainer in dtypes for mode in modes]
    return {
        "schema_version": 1,
        "model": "smollm2-135m",
        "pairs": pairs,
        "missing": [],
        "nulls": [_null("vllm-bfloat16-decode", 1.2e-4), _null("hf-bfloat16-cast", 0.0)],
        "findings": [{"text": "BF16 is 7.9× [7.0, 8.9] further apart than FP16.", "value": 7.9}],
        "limits": [],
    }


def _with_exact(summary: dict[str, Any], *, reference: str = "hf-float64-cast") -> dict[str, Any]:
    """`summary` with full rows of logits, a reference and sorted tokens; only bfloat16 sampled."""
    errors = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 4e-6}
    elsewhere = _absent("these tokens were sampled by A")
    for pair in summary["pairs"]:
        size = max(SCALES[pair["rollout_dtype"]], SCALES[pair["trainer_dtype"]])
        rollout, trainer = 1.5 * errors[pair["rollout_dtype"]], errors[pair["trainer_dtype"]]
        pair["on_policy"] = pair["rollout_dtype"] == "bfloat16"
        pair["metrics"] |= {
            "kl_k1": _value(-0.5 * size**2, 40.0) if pair["on_policy"] else elsewhere,
            "ess_seq": _value(0.9, 0.02) if pair["on_policy"] else elsewhere,
            "kl_k2": _value(1.1 * size**2, 0.3),
            "kl_exact": _value(0.9 * size**2, 0.1),
            "top1_flip_rate": _value(0.0125, 0.5),
        }
        pair["budget"] = {
            "rollout_error_rms": _value(rollout, 0.1),
            "trainer_error_rms": _value(trainer, 0.1),
            "predicted_gap_rms": _value((rollout**2 + trainer**2) ** 0.5, 0.1),
            "measured_gap_rms": _value(1.25 * size, 0.1),
            "error_correlation": _value(0.2, 0.5),
            "measured_over_predicted": _absent("one side is the reference itself"),
        }
        pair["estimators"] = [
            {
                "key": key,
                "mean": size**2,
                "bias": 0.0,
                "standard_deviation": k * size,
                "tokens_needed": 22_832_564_803_474 // k if size else None,
            }
            for k, key in enumerate(("kl_k1", "kl_k2", "kl_k3", "kl_exact"), start=1)
        ]
    dtypes = dict.fromkeys(pair["rollout_dtype"] for pair in summary["pairs"])
    return summary | {"reference": reference, "where": {dtype: _where() for dtype in dtypes}}


def _value(value: float, spread: float) -> dict[str, Any]:
    return {"value": value, "ci_low": value - spread * abs(value), "ci_high": value + spread * abs(value)}


def _absent(why: str) -> dict[str, Any]:
    return {"value": None, "ci_low": None, "ci_high": None, "why": why}


def _where() -> dict[str, list[dict[str, Any]]]:
    labels = {
        "probability": ("0–0.01", "0.01–0.5", "0.5–1"),
        "entropy": ("0–1", "1–2", "≥ 6"),
        "rank": ("0", "1", "≥ 1000"),
        "position": ("0–9", "10–19", "20–29"),
        "token_kind": ("digit", "word", "special"),
    }
    return {
        name: [
            {
                "label": label,
                "n_tokens": 1000 * (k + 1),
                "share_of_tokens": (k + 1) / 6,
                "share_of_square": (3 - k) / 6,
                "mean_abs": 1e-2,
                "ci_low": None if k else 9e-3,
                "ci_high": None if k else 1.1e-2,
            }
            for k, label in enumerate(names)
        ]
        for name, names in labels.items()
    }


MANIFEST: dict[str, Any] = {
    "status": "complete",
    "model": {"name": "smollm2-135m", "files": {"model.safetensors": "ab" * 32}},
    "config": {"dtypes": ["bfloat16", "float16"], "seed": 0},
    "environment": {"gpu": None, "torch": "2.9"},
    "passes": {
        "vllm-bfloat16-decode": {
            "status": "complete",
            "counts": {
                "n_sequences": 64,
                "n_tokens": 10_240,
                "n_nonfinite": 0,
                "n_truncated": 12,
                "n_empty": 1,
                "n_dropped": 2,
            },
            "deterministic": {"promised": False, "why": "batches form by arrival"},
        },
        "vllm-float16-decode": {"status": "refused", "why": "float16 overflows in this model"},
    },
}


def worst_token(**changes: Any) -> WorstToken:
    fields: dict[str, Any] = {
        "pair": "bfloat16",
        "sequence_id": 3,
        "prompt_id": "math-017",
        "position": 41,
        "token_id": 512,
        "token_text": " therefore",
        "context": "so x = 3 and",
        "rollout_logprob": -3.2,
        "trainer_logprob": -4.9,
        "log_ratio": -1.7,
        "share_of_square": 0.0464,
    }
    return WorstToken(**(fields | changes))


@pytest.fixture
def make_curves() -> CurvesFactory:
    """Curves of some dtypes; `scale=0` makes every difference zero."""
    return _curves


@pytest.fixture
def make_summary() -> SummaryFactory:
    """A complete summary of all pairs of some dtypes."""
    return _summary


@pytest.fixture
def exact() -> ReportData:
    """A complete run with full rows of logits, a float64 reference and sorted tokens."""
    return ReportData(_with_exact(_summary()), MANIFEST, _curves(), [worst_token()])


@pytest.fixture
def data() -> ReportData:
    """A complete run as older versions summarised it, with a missing pair, a limit of each state and a worst token."""
    summary = _summary()
    gone = summary["pairs"].pop(3)
    keys = ("rollout_pass", "trainer_pass", "rollout_dtype", "trainer_dtype", "trainer_mode")
    summary["missing"] = [{key: gone[key] for key in keys} | {"why": "vLLM refused float16"}]
    limit = {"rollout_dtype": "bfloat16", "trainer_dtype": "bfloat16"}
    summary["limits"] = [
        limit | {"limit": "kl_k3>1", "value": 2e-3, "exceeded": False, "why": ""},
        limit | {"limit": "ess_seq>2@float16", "value": None, "exceeded": None, "why": "tokens are not finite"},
        limit | {"limit": "kl_k3>0.001@bfloat16/bfloat16", "value": 2e-3, "exceeded": True, "why": ""},
    ]
    return ReportData(summary, MANIFEST, _curves(), [worst_token()])


@pytest.fixture
def hostile() -> ReportData:
    """A run in which every string that a model, engine or file name can reach tries to break out."""
    summary = _with_exact(_summary(("bfloat16",)), reference=HOSTILE)
    summary["model"] = HOSTILE
    summary["where"]["recorded → bfloat16"] = {"token_kind": [dict(_where()["token_kind"][0], label=HOSTILE)]}
    summary["pairs"][0]["budget"]["error_correlation"]["why"] = HOSTILE
    summary["pairs"][0]["metrics"]["kl_exact"]["why"] = HOSTILE
    summary["pairs"].append(
        {"rollout_dtype": "recorded", "trainer_dtype": "bfloat16", "on_policy": False}
        | {"metrics": {key: _absent(HOSTILE) for key in ("kl_exact", "ess_seq")}}
        | {"budget": {"rollout_error_rms": _absent(HOSTILE)}, "estimators": None}
    )
    summary["pairs"][0]["metrics"]["kl_k3"] = {"value": None, "ci_low": None, "ci_high": None, "why": HOSTILE}
    summary["missing"] = [
        {"rollout_dtype": "float16", "trainer_dtype": "bfloat16", "trainer_mode": "cast", "why": HOSTILE}
    ]
    summary["limits"] = [{"limit": HOSTILE, "value": 1.0, "exceeded": True, "why": HOSTILE}]
    summary["findings"] = [{"text": HOSTILE}]
    manifest = {"status": "stopped", HOSTILE: HOSTILE, "passes": {HOSTILE: {"status": "failed", "why": HOSTILE}}}
    token = worst_token(prompt_id=HOSTILE, token_text=HOSTILE, context=HOSTILE, pair=HOSTILE)
    return ReportData(summary, manifest, _curves(("bfloat16",)), [token])


@pytest.fixture
def empty() -> ReportData:
    """A run of which nothing is known."""
    return ReportData({}, {}, Curves(), [])


@pytest.fixture
def sparse() -> ReportData:
    """A run in which every optional field of every row is None or absent."""
    bare = {"rollout_dtype": "bfloat16", "trainer_dtype": "bfloat16"}
    no_value = {"value": None, "ci_low": None, "ci_high": None}
    summary: dict[str, Any] = {
        "model": None,
        "pairs": [
            bare | {"budget": {"rollout_error_rms": no_value}, "estimators": [{}]},
            bare | {"trainer_dtype": "float16", "metrics": {"kl_k3": no_value, "kl_exact": no_value}, "null": None},
            bare | {"trainer_dtype": "float32", "budget": None, "estimators": None},
        ],
        "reference": None,
        "where": {"bfloat16": {"probability": []}, "float16": {}},
        "missing": [{"rollout_dtype": "float32"}],
        "nulls": [{}],
        "findings": [{}],
        "limits": [{}],
    }
    manifest = {"passes": {"vllm-bfloat16-decode": {}, "hf-bfloat16-cast": {"counts": None, "deterministic": None}}}
    return ReportData(summary, manifest, Curves(), [])
