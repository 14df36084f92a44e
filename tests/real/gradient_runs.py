"""A comparison's folder without its rollout engine: sequences of a tiny checkpoint, with log-probs that are planted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines.models import resolve
from mismatch_probe.results.manifest import Manifest, ModelRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import sequences_table, tokens_table
from mismatch_probe.types import Dtype, Rollout, RolloutRequest, Score, ScoreRequest
from tests.factories.manifest import make_manifest, make_pass
from tests.real.test_hf_trainer import scores, trainer
from tests.real.tiny import VOCABULARY

PROMPTS, SAMPLES, LONGEST = 8, 2, 12


def plant_run(folder: Path, checkpoint: Path, gaps: Mapping[Dtype, float]) -> RunDirectory:
    """Every rollout dtype has the same sequences, with as much noise a token, in nats, as `gaps` says; the first
    sequence is empty. The trainer of a 16-bit dtype has a third of that noise, drawn anew, the one in FP32 has none.
    """
    draw = np.random.default_rng(3)
    samples = [(f"p{i}", sample) for i in range(PROMPTS) for sample in range(SAMPLES)]
    prompts = {name: draw.integers(4, VOCABULARY, draw.integers(2, 6)).tolist() for name, _ in samples}
    lengths = [0, *draw.integers(3, LONGEST + 1, len(samples) - 1)]
    responses = [draw.integers(4, VOCABULARY, length).tolist() for length in lengths]
    asked = [ScoreRequest(i, prompts[samples[i][0]], response) for i, response in enumerate(responses) if response]
    clean = {i: np.asarray(found, np.float64) for i, found in scores(trainer(checkpoint), asked).items()}
    run = RunDirectory.create(folder, _manifest(checkpoint, tuple(gaps)))
    trained: dict[str, list[Score]] = {}
    for index, (dtype, gap) in enumerate(gaps.items()):
        first, name = index * len(samples), f"vllm-{dtype}-decode"
        requests = [RolloutRequest(first + i, prompts[samples[i][0]], i) for i in range(len(samples))]
        rollouts = []
        for i, response in enumerate(responses):
            right = clean.get(i, np.empty(0))
            rollouts.append(Rollout(first + i, response, right + draw.normal(0, gap, len(right)), "length"))
            own = {dtype: right + draw.normal(0, gap / 3, len(right)), "float32": right}
            for trainer_dtype, logprobs in own.items() if response else ():
                trained.setdefault(trainer_dtype, []).append(Score(first + i, logprobs))
        tokens = tokens_table(name, rollouts, lambda rollout: rollout.response_token_ids)
        sequences = sequences_table(name, requests, rollouts, *zip(*samples, strict=True))
        run.finish_pass(name, make_pass(), {"tokens": tokens, "sequences": sequences})
    for dtype, found in trained.items():
        name = f"hf-{dtype}-cast"
        covers = [f"vllm-{rollout}-decode" for rollout in gaps if dtype in (rollout, "float32")]
        tokens = tokens_table(name, found, lambda score: responses[score.sequence_id % len(samples)])
        run.finish_pass(name, make_pass(covers=tuple(covers)), {"tokens": tokens})
    run.merge()
    run.manifest.status = "complete"
    run.save()
    return run


def _manifest(checkpoint: Path, dtypes: tuple[Dtype, ...]) -> Manifest:
    trainers = tuple(dict.fromkeys((*dtypes, "float32")))
    config = CompareConfig(model=str(checkpoint), rollout_dtypes=dtypes, trainer_dtypes=trainers)
    model = resolve(str(checkpoint))
    return make_manifest(
        config=config,
        sizes={"max_tokens": LONGEST},
        model=ModelRecord(name="tiny", path=str(model.path), files=model.file_hashes()),
    )
