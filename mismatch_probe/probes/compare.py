"""How large is the mismatch, per dtype pair? Runs a comparison's engine passes, one process at a time, resumably."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import EncodeJob, RolloutJob, TrainerJob
from mismatch_probe.engines.process import Kind, UnexpectedEngineError
from mismatch_probe.errors import DiskFull, DtypeRefused, EngineError, Interrupted, PromptError, TableError
from mismatch_probe.probes.planning import Plan, TrainerPass, kv_cache_gib, null_pass_id, rollout_pass_id
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Collected, Workers, drive
from mismatch_probe.tables import RunDirectory, sequences_table, tokens_table
from mismatch_probe.types import Dtype, EncodedPrompt, Rollout, Sampling, Score, ScoreRequest

NULL_SEQUENCES = 16


class Comparison:
    """The engine passes of one run directory."""

    def __init__(self, plan: Plan, run: RunDirectory, progress: Progress) -> None:
        self._plan = plan
        self._run = run
        self._progress = progress
        self._in_process = devices.in_process_wanted()
        self._fallback = ""

    def execute(self) -> None:
        """Runs every pass that is not finished. Passes that fail are recorded; the others go on.

        Raises:
            Interrupted: The user stopped it; finished passes stay.
            ProbeError: No other pass could run either (prompts, tokenizer, packages, disk).
        """
        resume = f"Continue with: mismatch-probe compare --resume {self._run.path}"
        self._run.manifest["status"] = "running"
        self._run.save()
        try:
            with Workers(self._run.path / "logs") as workers:
                encoded = self._encode(workers)
                for dtype in self._plan.config.rollout_dtypes:
                    self._rollout(workers, dtype, encoded)
                for trainer in self._plan.trainers:
                    self._train(workers, trainer)
            self._run.merge()
        except KeyboardInterrupt:
            self._close("interrupted")
            raise Interrupted("Stopped; finished passes are kept.", resume) from None
        except DiskFull:
            raise  # the manifest cannot be written either; as it lies, it says `running`, and resumes
        except BaseException:
            self._close("failed")
            raise
        failed = [name for name, record in self._run.manifest["passes"].items() if record["status"] == "failed"]
        self._close("incomplete" if failed else "complete")

    def _close(self, status: str) -> None:
        self._run.manifest["status"] = status
        self._run.save()

    def _encode(self, workers: Workers) -> list[EncodedPrompt]:
        plan = self._plan
        job = EncodeJob(str(plan.model.path), plan.prompts.prompts, plan.config.chat, plan.config.trust_remote_code)
        self._progress.message("encoding prompts")
        environment = devices.trainer_settings(plan.device, "float32").environment
        process = workers.take("encode", environment)
        self._prepare_next(workers, None)
        collected = drive(process, "encode", job, self._progress)
        digest = hashlib.sha256(json.dumps([p.token_ids for p in collected.encoded]).encode()).hexdigest()
        known = self._run.manifest["prompts"].setdefault("token_ids_sha256", digest)
        if known != digest:
            raise TableError(
                "The prompts are encoded to other ids than when this run began.",
                "The model folder or the prompt file has changed; start a new run.",
            )
        self._check_context(collected.encoded)
        return collected.encoded

    def _check_context(self, encoded: list[EncodedPrompt]) -> None:
        context = self._plan.model.context
        longest = max(encoded, key=lambda p: len(p.token_ids))
        if context is not None and len(longest.token_ids) >= context:
            raise PromptError(
                f"Prompt {longest.prompt_id} has {len(longest.token_ids)} tokens; the model's context is {context}.",
                "Shorten it or take it out of the prompt file.",
            )

    def _rollout(self, workers: Workers, dtype: Dtype, encoded: list[EncodedPrompt]) -> None:
        pass_id = rollout_pass_id(dtype)
        if self._settled(pass_id):
            return
        plan, sizes = self._plan, self._plan.sizes
        longest = max(len(p.token_ids) for p in encoded) + sizes.max_tokens
        requests = plan.requests(dtype, encoded)

        def attempt() -> Collected:
            kind, settings = self._rollout_process(dtype)
            job = RolloutJob(
                engine=plan.engine,
                model_path=str(plan.model.path),
                dtype=dtype,
                device=plan.device,
                sampling=Sampling(sizes.max_tokens, plan.config.temperature, plan.config.seed),
                requests=requests,
                batch=sizes.rollout_batch,
                null_tokens=sizes.null_tokens,
                max_model_len=min(longest, plan.model.context or longest),
                in_process=self._in_process,
                trust_remote_code=plan.config.trust_remote_code,
                arguments={**settings.arguments, **plan.config.engine_args},
            )
            process = workers.take(kind, settings.environment)
            self._prepare_next(workers, pass_id)
            return drive(process, pass_id, job, self._progress)

        def run() -> Collected:
            try:
                return attempt()
            except UnexpectedEngineError as error:
                if not self._in_process:
                    raise
                # Some architectures run only in vLLM's own engine process; the rest of this run goes there at once.
                self._in_process, self._fallback = False, error.what
                self._progress.message("vLLM failed in-process; trying its own engine process")
                return attempt()

        collected = self._guarded(pass_id, run)
        if collected is None:
            return
        if not any(r.response_token_ids for r in collected.rollouts):
            self._fail(pass_id, EngineError("The engine generated no tokens.", "Check the prompts and --max-tokens."))
            return
        self._store_rollouts(pass_id, dtype, encoded, collected)

    def _store_rollouts(self, pass_id: str, dtype: Dtype, encoded: list[EncodedPrompt], collected: Collected) -> None:
        samples, requests = self._plan.sizes.samples_per_prompt, self._plan.requests(dtype, encoded)
        record = self._record(collected) | {
            "deterministic": devices.determinism(self._plan.device, in_process=self._in_process),
            "counts": {
                "n_sequences": len(requests),
                "n_tokens": sum(len(r.response_token_ids) for r in collected.rollouts),
                "n_nonfinite": _nonfinite(collected.rollouts),
                "n_truncated": sum(r.finish_reason == "length" for r in collected.rollouts),
                "n_empty": sum(not r.response_token_ids for r in collected.rollouts),
            },
        }
        if self._fallback:
            record["in_process_failure"] = self._fallback
        sequences = sequences_table(
            pass_id,
            requests,
            collected.rollouts,
            [prompt.prompt_id for prompt in encoded for _ in range(samples)],
            [sample for _ in encoded for sample in range(samples)],
        )
        ids = _ids_of(collected.rollouts)
        if collected.null_rollouts:
            null = null_pass_id(pass_id)
            again = tokens_table(null, collected.null_rollouts, _ids_of(collected.null_rollouts), collected.texts.get)
            self._run.finish_pass(null, again, {"null_of": pass_id})
        self._run.finish_pass(
            pass_id, tokens_table(pass_id, collected.rollouts, ids, collected.texts.get), record, sequences
        )

    def _train(self, workers: Workers, trainer: TrainerPass) -> None:
        pass_id, run = trainer.pass_id, self._run
        rollouts = [p for p in map(rollout_pass_id, self._plan.config.rollout_dtypes) if run.finished(p)]
        record = run.manifest["passes"].get(pass_id, {})
        covered = record.get("covers", [])
        missing = [name for name in rollouts if name not in covered]
        if not missing or record.get("status") == "refused":
            return
        requests = _score_requests(pa.concat_tables([run.sequences(name) for name in missing]))
        distinct = _distinct(requests)
        job = TrainerJob(
            engine="scripted" if self._plan.model.scripted else "hf",
            model_path=str(self._plan.model.path),
            dtype=trainer.dtype,
            mode=trainer.mode,
            layout=self._plan.config.trainer_layout,
            attention=self._plan.config.trainer_attn,
            device=self._plan.device,
            temperature=self._plan.config.temperature,
            requests=[group[0] for group in distinct],
            null_sequences=NULL_SEQUENCES if self._plan.sizes.null_tokens and not covered else 0,
            memory_budget=int(self._plan.sizes.memory_budget_gib * devices.GIB),
            trust_remote_code=self._plan.config.trust_remote_code,
            flags=devices.trainer_settings(self._plan.device, trainer.dtype).arguments,
        )

        def score() -> Collected:
            kind, settings = self._trainer_process(trainer.dtype)
            process = workers.take(kind, settings.environment)
            self._prepare_next(workers, pass_id)
            return drive(process, pass_id, job, self._progress)

        collected = self._guarded(pass_id, score)
        if collected is not None:
            self._store_scores(pass_id, distinct, collected, covered, missing)

    def _store_scores(
        self,
        pass_id: str,
        distinct: list[list[ScoreRequest]],
        collected: Collected,
        covered: list[str],
        missing: list[str],
    ) -> None:
        twins = {group[0].sequence_id: group for group in distinct}
        ids = {request.sequence_id: request.response_token_ids for group in distinct for request in group}

        def table(name: str, scores: list[Score]) -> pa.Table:
            every = [Score(twin.sequence_id, s.logprobs) for s in scores for twin in twins[s.sequence_id]]
            return tokens_table(name, every, lambda score: ids[score.sequence_id])

        tokens = table(pass_id, collected.scores)
        if covered:
            tokens = pa.concat_tables([self._run.tokens(pass_id), tokens]).sort_by(
                [("sequence_id", "ascending"), ("position", "ascending")]
            )
        if collected.null_scores:
            null = null_pass_id(pass_id)
            self._run.finish_pass(null, table(null, collected.null_scores), {"null_of": pass_id})
        record = self._record(collected) | {
            "covers": [*covered, *missing],
            "deterministic": devices.determinism(self._plan.device, in_process=True),
            "counts": {
                "n_sequences": len(ids),
                # Engines often sample the same response from the same seed; the forward pass sees each one once.
                "n_distinct_sequences": len(distinct),
                "n_tokens": tokens.num_rows,
                "n_nonfinite": _nonfinite(collected.scores),
            },
        }
        self._run.finish_pass(pass_id, tokens, record)

    def _settled(self, pass_id: str) -> bool:
        """Whether a pass is finished or refused; one that failed is taken off the manifest before it is tried again."""
        return pass_id in self._run.manifest["passes"]

    def _guarded(self, pass_id: str, run: Callable[[], Collected]) -> Collected | None:
        """Runs a pass; a failure of this engine is recorded, and leaves the other passes to go on."""
        try:
            return run()
        except EngineError as error:
            self._fail(pass_id, error)
            return None

    def _fail(self, pass_id: str, error: EngineError) -> None:
        status = "refused" if isinstance(error, DtypeRefused) else "failed"
        self._run.manifest["passes"][pass_id] = {"status": status, "why": error.what, "fix": error.fix}
        self._run.save()
        self._progress.end(pass_id, str(error))

    def _record(self, collected: Collected) -> dict[str, Any]:
        return {"engine": collected.identity, "timings": collected.timings}

    def _rollout_process(self, dtype: Dtype) -> tuple[Kind, devices.EngineSettings]:
        plan = self._plan
        if plan.model.scripted:
            return "scripted", devices.EngineSettings()
        settings = devices.rollout_settings(
            plan.device, dtype, eager=plan.config.eager, in_process=self._in_process, kv_cache_gib=kv_cache_gib(plan)
        )
        return "vllm", settings

    def _trainer_process(self, dtype: Dtype) -> tuple[Kind, devices.EngineSettings]:
        if self._plan.model.scripted:
            return "scripted", devices.EngineSettings()
        return "hf", devices.trainer_settings(self._plan.device, dtype)

    def _prepare_next(self, workers: Workers, current: str | None) -> None:
        """Lets the process of the pass after `current` import ahead."""
        order: list[tuple[str, tuple[Kind, devices.EngineSettings]]] = [
            *((rollout_pass_id(d), self._rollout_process(d)) for d in self._plan.config.rollout_dtypes),
            *((t.pass_id, self._trainer_process(t.dtype)) for t in self._plan.trainers),
        ]
        names = [name for name, _ in order]
        for name, (kind, settings) in order[names.index(current) + 1 if current else 0 :]:
            if not self._settled(name):
                workers.prepare(kind, settings.environment)
                return


def _ids_of(rollouts: list[Rollout]) -> Any:
    return lambda rollout: rollout.response_token_ids


def _nonfinite(items: list[Rollout] | list[Score]) -> int:
    return sum(not -float("inf") < value < float("inf") for item in items for value in item.logprobs)


def _score_requests(sequences: pa.Table) -> list[ScoreRequest]:
    columns = (sequences[name].to_pylist() for name in ("sequence_id", "prompt_token_ids", "response_token_ids"))
    return [ScoreRequest(*row) for row in zip(*columns, strict=True) if row[2]]


def _distinct(requests: list[ScoreRequest]) -> list[list[ScoreRequest]]:
    """Groups of requests with the same ids: one forward pass serves each group."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[ScoreRequest]] = {}
    for request in requests:
        groups.setdefault((tuple(request.prompt_token_ids), tuple(request.response_token_ids)), []).append(request)
    return list(groups.values())
