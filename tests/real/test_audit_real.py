"""An audit from the engines to the files, on tiny models in real vLLM and real transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.errors import DtypeRefused
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.probes.audit.advice import snippets
from mismatch_probe.results.audit import Audit, AuditedPair, Check
from tests.conftest import Recorder
from tests.factories.audit import recommendation
from tests.real.planted_range import LAYER, plant_outlier

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
SMALL: dict[str, Any] = {
    "num_prompts": 16,
    "max_tokens": 16,
    "rollout_dtypes": ("float16",),
    "trainer_dtypes": ("float16",),
    "self_noise_tokens": 0,
}


def check_of(pair: AuditedPair, name: str) -> Check:
    return next(check for check in pair.checks if check.name == name)


def test_an_outlier_fails_in_the_real_engine_too_and_a_second_call_starts_none(tiny: Tiny, tmp_path: Path) -> None:
    sequences = [list(range(4 + i, 24 + i)) for i in range(16)]
    model = plant_outlier(tiny("llama"), tmp_path / "model", sequences, 400_000)
    result = mismatch_probe.audit(model=str(model), **SMALL, out=tmp_path / "run")
    assert Audit.read(tmp_path / "run" / "audit" / "audit.json") == result.audit
    (pair,) = result.audit.pairs
    assert (result.verdict, result.failed, pair.verdict) == ("fail", True, "fail")
    for name in ("fp16_headroom", "fp16_pass"):
        found = check_of(pair, name)
        assert (found.verdict, found.finding.where) == ("fail", f"{LAYER}.mlp.down_proj")
    # vLLM's own FP16 forward breaks as well.
    assert check_of(pair, "nonfinite_logprobs").verdict == "fail"
    # The answer of FP16 names the tensor, not what follows from it.
    answer = result.audit.answers[0]
    assert (answer.check, answer.finding.where) == ("fp16_headroom", f"{LAYER}.mlp.down_proj")
    assert set(result.figures) == {"range", "gradients", "lag"}
    for path in (*result.figures.values(), tmp_path / "run" / "audit" / "report.html"):
        assert path.stat().st_size > 10_000

    again = Recorder()
    second = mismatch_probe.Run.open(result.path).audit(progress=again)
    assert again.begun == []
    assert second.audit == result.audit
    assert mismatch_probe.Run.open(result.path).audit(engines=False).audit == result.audit

    (result.path / "audit" / "proof.npz").write_bytes(b"cut off")
    (missing,) = mismatch_probe.Run.open(result.path).audit(engines=False).audit.missing
    assert (missing.code, missing.names("parts")) == ("audit-parts-stale", ("proof",))
    whole = mismatch_probe.Run.open(result.path).audit(progress=again)
    assert again.begun == ["audit"]
    assert whole.audit == result.audit
    # Another step makes other gradients, and nothing else anew.
    shifted = mismatch_probe.Run.open(result.path).audit(step_tokens=4096, progress=again).audit.range
    first = result.audit.range
    assert shifted.forward == first.forward
    assert shifted.backward is not None
    assert first.backward is not None
    ratio = first.backward.step_tokens / 4096
    assert shifted.backward.largest == pytest.approx(first.backward.largest * ratio, rel=1e-4)


def test_a_model_type_that_vllm_refuses_gets_the_sentence_and_nothing_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DtypeRefused) as error:
        mismatch_probe.audit(model=str(tiny("gemma2")), **SMALL, out=tmp_path / "run")
    assert error.value.what.startswith("vLLM does not support float16 for model type gemma2: Numerical instability.")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_vllm_takes_the_command_line_that_is_recommended() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = snippets(recommendation("float16", CORRECTIONS["token-tis"], 2.0**16, "cast"), "organisation/model")[-1]
    words = found.text.split()
    assert words[:2] == ["vllm", "serve"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    assert (parsed.dtype, parsed.logprobs_mode, parsed.generation_config) == ("float16", "processed_logprobs", "vllm")
