"""Recordings: what vLLM sampled, with its own log-probs, from the weights that it was given.

One engine serves all recordings of a model and dtype. Its log-probs are those of the distribution that it sampled from
(`processed`), or of the network's own at temperature 1 (`raw`); which, can be chosen for each recording.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mismatch_probe.engines.base import LESS_OR_MORE, Channel, RolloutJob
from mismatch_probe.engines.events import Message
from mismatch_probe.types import Dtype, Sampling
from validation.faults import models
from validation.faults.models import Model, ModelName, Split


@dataclass(frozen=True)
class Decode:
    """How tokens are drawn; by default from the network's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Recording:
    """What is sampled.

    Attributes:
        model, dtype, split: Of the case.
        weights: Those that sample, see `weights`.
        count, tokens: Sequences, and response tokens of each at most.
        first: Prompts that are skipped.
        seed: Of the first sequence; each has its own.
        decode, raw: How, and which log-probs.
        long: Whether prompts are some 200 tokens long.
        prefill: Weights whose prefill of the ids is kept too; None for no prefill.
        turns, strip: Turns of a conversation, and the share of each response that later turns no longer see.
        switch, switch_at: Weights that take over after so many tokens.
        stale: Weights that have seen the prompts just before, in a prefix cache that is kept.
        kv_cache: Its dtype.
    """

    model: ModelName
    dtype: Dtype
    split: Split
    weights: str = ""
    count: int = 64
    tokens: int = 48
    first: int = 0
    seed: int = 0
    decode: Decode = Decode()
    raw: bool = False
    long: bool = False
    prefill: str | None = None
    turns: int = 1
    strip: float = 0.0
    switch: str | None = None
    switch_at: int = 0
    stale: str | None = None
    kv_cache: str = "auto"

    @cached_property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.model}-{self.dtype}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def needs(self) -> list[str]:
        """Names of weights."""
        return [name for name in (self.weights, self.prefill, self.switch, self.stale) if name]


@dataclass(frozen=True)
class Recorded:
    """A recorded sequence; lists run along the response.

    Attributes:
        prompt_id, prompt, response, finish_reason: As sampled.
        logprobs: The engine's; 0 where it sampled nothing.
        top: Log-prob of the likeliest token.
        turn: Turn of each token.
        sampled: 1 where the engine sampled.
        switched: 1 where other weights had taken over.
        prefill: The engine's log-probs of the same ids by prefill.
    """

    prompt_id: str
    prompt: list[int]
    response: list[int]
    finish_reason: str
    logprobs: list[float]
    top: list[float]
    turn: list[int]
    sampled: list[int]
    switched: list[int]
    prefill: list[float] | None = None


def read(path: Path) -> list[Recorded]:
    return [Recorded(**row) for row in json.loads(path.read_text())]


@dataclass(frozen=True)
class RecordJob:
    """Makes recordings of one model and dtype, one file each."""

    model: Model
    recordings: Sequence[Recording]
    folder: str

    @property
    def subject(self) -> str:
        return f"The recording of {self.model.name}"

    @property
    def model_path(self) -> str:
        return str(self.model.path)

    trust_remote_code = False
    memory_advice = LESS_OR_MORE

    def run(self, channel: Channel) -> None:
        engine = _engine(self.model, self.recordings[0])
        recorder = _Recorder(engine, self.model, Path(self.folder))
        for recording in self.recordings:
            path = Path(self.folder) / "recordings" / f"{recording.key}.json"
            rows = [asdict(row) for row in recorder.record(recording)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows))
            os.replace(temporary, path)
            channel.send(Message(f"{recording.key} {recording.weights} {recording.decode}"))
        engine.close()


def _engine(model: Model, recording: Recording) -> Any:
    from mismatch_probe.engines.vllm.engine import VllmRollout
    from mismatch_probe.engines.vllm.settings import rollout_settings

    arguments = rollout_settings("cpu", recording.dtype, eager=True, in_process=True, kv_cache_gib=1).arguments
    extra = {"kv_cache_dtype": recording.kv_cache, "logprobs_mode": "processed_logprobs", "max_logprobs": 5}
    extra |= {"max_num_batched_tokens": 8192, "block_size": 32}
    job = RolloutJob(
        "vllm", str(model.path), recording.dtype, "cpu", Sampling(1), [], 64, 0, 512, arguments=arguments | extra
    )
    return VllmRollout(job)


def _set_mode(mode: str, worker: Any) -> None:
    sampler = getattr(worker, "worker", worker).model_runner.sampler
    sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = mode


class _Recorder:
    def __init__(self, engine: Any, model: Model, folder: Path) -> None:
        self._engine, self._llm, self._model, self._folder = engine, engine._llm, model, folder
        self._weights: str = ""

    def _load(self, name: str) -> None:
        from validation.faults.weights import tensors

        if name != self._weights:
            found = tensors(self._folder, self._model, name)
            self._engine.load_weights(found.items())
            self._weights = name

    def _sample(
        self, recording: Recording, prompts: Sequence[Sequence[int]], seeds: Sequence[int], tokens: int
    ) -> list[tuple[list[int], list[float], list[float], str]]:
        from functools import partial

        from vllm import SamplingParams

        self._llm.collective_rpc(partial(_set_mode, "raw_logprobs" if recording.raw else "processed_logprobs"))
        decode = asdict(recording.decode)
        params = [SamplingParams(**decode, seed=s, max_tokens=tokens, logprobs=1, detokenize=False) for s in seeds]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for output in self._llm.generate(inputs, params, use_tqdm=False):
            made = output.outputs[0]
            ids = list(made.token_ids)
            own = [row[i].logprob for row, i in zip(made.logprobs, ids, strict=True)]
            top = [max(entry.logprob for entry in row.values()) for row in made.logprobs]
            found.append((ids, own, top, str(made.finish_reason)))
        return found

    def record(self, recording: Recording) -> list[Recorded]:
        named = models.prompts(self._model, recording.split, recording.first + recording.count, long=recording.long)
        named = named[recording.first :]
        prompts = [ids for _, ids in named]
        seeds = [recording.seed + i for i in range(recording.count)]
        self._llm.reset_prefix_cache()
        if recording.stale is not None:
            self._load(recording.stale)
            self._llm.reset_prefix_cache()
            self._sample(recording, prompts, seeds, 2)
            self._load(recording.weights)
        else:
            self._load(recording.weights)
        if recording.turns > 1:
            rows = self._conversations(recording, named, seeds)
        elif recording.switch is not None:
            rows = self._switched(recording, named, seeds)
        else:
            made = self._sample(recording, prompts, seeds, recording.tokens)
            rows = [_row(name, ids, [part], switched=[0]) for (name, ids), part in zip(named, made, strict=True)]
        if recording.prefill is not None:
            self._load(recording.prefill)
            self._llm.collective_rpc(_raw)
            whole = self._engine.score([[*row.prompt, *row.response] for row in rows])
            rows = [
                replace(row, prefill=[float(x) for x in values[len(row.prompt) - 1 :]])
                for row, values in zip(rows, whole, strict=True)
            ]
        return rows

    def _switched(self, recording: Recording, named: Any, seeds: Any) -> list[Recorded]:
        """Other weights take over; what was made before is prefilled again."""
        assert recording.switch is not None
        begun = self._sample(recording, [ids for _, ids in named], seeds, recording.switch_at)
        self._load(recording.switch)
        self._llm.reset_prefix_cache()
        going = [i for i, part in enumerate(begun) if part[3] == "length"]
        prompts = [[*named[i][1], *begun[i][0]] for i in going]
        ended = self._sample(
            recording, prompts, [seeds[i] + 100_000 for i in going], recording.tokens - recording.switch_at
        )
        later = dict(zip(going, ended, strict=True))
        return [
            _row(name, ids, [begun[i], *([later[i]] if i in later else [])], switched=[0, 1])
            for i, (name, ids) in enumerate(named)
        ]

    def _conversations(self, recording: Recording, named: Any, seeds: Any) -> list[Recorded]:
        """Turns with what an environment says in between; `strip` of each response is gone from later prompts."""
        contexts = [list(ids) for _, ids in named]
        parts: list[list[Any]] = [[] for _ in named]
        for turn in range(recording.turns):
            made = self._sample(recording, contexts, [seed + 1000 * turn for seed in seeds], recording.tokens)
            for i, (ids, own, top, reason) in enumerate(made):
                if turn:
                    said = list(models.environment(self._model, 10 * i + turn))
                    parts[i].append((said, [0.0] * len(said), [0.0] * len(said), ""))
                parts[i].append((ids, own, top, reason))
                following = models.environment(self._model, 10 * i + turn + 1)
                contexts[i] = contexts[i] + ids[int(recording.strip * len(ids)) :] + list(following)
        return [_conversation(name, ids, parts[i]) for i, (name, ids) in enumerate(named)]


def _raw(worker: Any) -> None:
    _set_mode("raw_logprobs", worker)


def _row(name: str, prompt: Sequence[int], parts: Sequence[Any], switched: Sequence[int]) -> Recorded:
    lengths = [len(part[0]) for part in parts]
    return Recorded(
        name,
        list(prompt),
        [i for part in parts for i in part[0]],
        parts[-1][3],
        [x for part in parts for x in part[1]],
        [x for part in parts for x in part[2]],
        [0] * sum(lengths),
        [1] * sum(lengths),
        [flag for flag, length in zip(switched, lengths, strict=False) for _ in range(length)],
    )


def _conversation(name: str, prompt: Sequence[int], parts: Sequence[Any]) -> Recorded:
    row = _row(name, prompt, parts, [0] * len(parts))
    turns = [(index + 1) // 2 for index, part in enumerate(parts) for _ in part[0]]
    sampled = [1 - index % 2 for index, part in enumerate(parts) for _ in part[0]]
    return replace(row, turn=turns, sampled=sampled)
