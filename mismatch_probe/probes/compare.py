"""How large is the mismatch, per dtype pair? Runs a comparison's engine passes, one process at a time, resumably."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import EncodeJob, RolloutJob, TrainerJob
from mismatch_probe.engines.process import Kind, UnexpectedEngineError
from mismatch_probe.errors import DiskFull, DtypeRefused, EngineError, Interrupted, PromptError, TableError
from mismatch_probe.probes.planning import Plan, TrainerPass, kv_cache_gib, rollout_pass_id
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.store import distinct_requests, store_rollouts, store_scores
from mismatch_probe.probes.workers import Collected, Workers, drive
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import Dtype, EncodedPrompt, Sampling

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
        records = self._run.manifest["passes"].values()
        failed = any(record["status"] == "failed" or "extension_failure" in record for record in records)
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
        if context is not None and len(longest.token_ids) + self._plan.sizes.max_tokens > context:
            self._progress.message(f"responses end at the model's context of {context} tokens, prompt included")

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
                engine=kind,
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
                self._progress.message("vLLM failed in-process; trying its own engine process")
                self._in_process = False
                try:
                    collected = attempt()
                except EngineError:
                    self._in_process = True  # the process was not to blame, so the next dtype starts as this one did
                    raise
                # Some architectures run only in vLLM's own engine process; the rest of this run goes there at once.
                self._fallback = error.what
                return collected

        collected = self._guarded(pass_id, run)
        if collected is None:
            return
        if not any(len(r.response_token_ids) for r in collected.rollouts):
            self._fail(pass_id, EngineError("The engine generated no tokens.", "Check the prompts and --max-tokens."))
            return
        facts: dict[str, Any] = {"deterministic": devices.determinism(plan.device, in_process=self._in_process)}
        if self._fallback:
            facts["in_process_failure"] = self._fallback
        samples = [(prompt.prompt_id, sample) for prompt in encoded for sample in range(sizes.samples_per_prompt)]
        store_rollouts(self._run, pass_id, requests, samples, collected, facts)

    def _train(self, workers: Workers, trainer: TrainerPass) -> None:
        pass_id, run = trainer.pass_id, self._run
        rollouts = [p for p in map(rollout_pass_id, self._plan.config.rollout_dtypes) if run.finished(p)]
        record = run.manifest["passes"].get(pass_id, {})
        covered = record.get("covers", [])
        missing = [name for name in rollouts if name not in covered]
        if not missing or record.get("status") == "refused":
            return
        distinct = distinct_requests([run.sequences(name) for name in missing])
        kind, settings = self._trainer_process(trainer.dtype)
        job = TrainerJob(
            engine=kind,
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
            flags=settings.arguments,
        )

        def score() -> Collected:
            process = workers.take(kind, settings.environment)
            self._prepare_next(workers, pass_id)
            return drive(process, pass_id, job, self._progress)

        collected = self._guarded(pass_id, score)
        if collected is not None:
            facts = {
                "deterministic": devices.determinism(self._plan.device, in_process=True),
                "covers": covered + missing,
            }
            store_scores(run, pass_id, distinct, collected, facts)

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
        passes = self._run.manifest["passes"]
        if self._run.finished(pass_id):
            # A trainer pass that was to score later sequences, too, keeps what it has.
            passes[pass_id]["extension_failure"] = error.what
        else:
            status = "refused" if isinstance(error, DtypeRefused) else "failed"
            passes[pass_id] = {"status": status, "why": error.what, "fix": error.fix}
        self._run.save()
        self._progress.end(pass_id, str(error))

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
