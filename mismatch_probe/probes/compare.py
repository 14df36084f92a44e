"""How large is the mismatch, per dtype pair? Runs a comparison's engine passes, one process at a time, resumably."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.encoding import EncodeJob
from mismatch_probe.engines.process import UnexpectedEngineError
from mismatch_probe.errors import DiskFull, DtypeRefused, EngineError, PromptError, TableError
from mismatch_probe.passes import PassId
from mismatch_probe.probes.planning import Plan, kv_cache_gib, request_seed
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.recorded import masks_of, store_recorded
from mismatch_probe.probes.store import KeptRows, distinct_requests, store_replay, store_rollouts, store_scores
from mismatch_probe.probes.workers import Collected, Wanted, Workers
from mismatch_probe.results.manifest import PassRecord, PassStatus, RunStatus
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import Masks
from mismatch_probe.types import EncodedPrompt, RolloutRequest, Sampling

SELF_NOISE_SEQUENCES = 16


class PassRunner:
    """Runs the engine passes of one run directory."""

    def __init__(self, plan: Plan, run: RunDirectory, progress: Progress) -> None:
        self._plan = plan
        self._run = run
        self._progress = progress
        self._in_process = all(plan.engine(r).in_process_wanted() for r in plan.passes.rollouts if not r.recorded)
        self._fallback = ""
        self._rows = KeptRows(plan, run)
        self._texts: dict[int, str] = {}

    @cached_property
    def _masks(self) -> Masks | None:
        """A number per token of a dump, read where an engine has a pass."""
        return masks_of(self._plan.recorded)

    def execute(self) -> None:
        """Runs every pass that is not finished. Passes that fail are recorded; the others go on.

        Raises:
            KeyboardInterrupt: The user stopped it; finished passes stay.
            ProbeError: No other pass could run either (prompts, tokenizer, packages, disk).
        """
        self._run.manifest.status = "running"
        self._run.save()
        try:
            with Workers(self._run.path / "logs") as workers:
                encoded = self._encode(workers) if self._plan.model.config else []
                if self._plan.recorded is not None:
                    store_recorded(self._run, self._plan.recorded, self._texts)
                for rollout in self._plan.passes.rollouts:
                    self._rollout(workers, rollout, encoded)
                for trainer in self._plan.passes.scored:
                    self._train(workers, trainer)
            self._run.merge()
        except KeyboardInterrupt:
            self._close("interrupted")
            raise
        except DiskFull:
            raise  # the manifest cannot be written either; as it lies, it says `running`, and resumes
        except BaseException:
            self._close("failed")
            raise
        records = self._run.manifest.passes.values()
        failed = any(record.status == "failed" or record.extension_failure for record in records)
        if not failed:
            self._rows.discard()
        self._close("incomplete" if failed else "complete")

    def _close(self, status: RunStatus) -> None:
        self._run.manifest.status = status
        self._run.save()

    def _encode(self, workers: Workers) -> list[EncodedPrompt]:
        plan = self._plan
        recorded = [] if plan.recorded is None else plan.recorded.distinct_ids()
        job = EncodeJob(
            str(plan.model.path), plan.prompts.prompts, plan.config.chat, plan.config.trust_remote_code, recorded
        )
        self._progress.message("encoding prompts")
        # In a trainer's process, which imports the tokenizer's package anyway.
        trainer = "scripted" if plan.model.scripted else plan.config.trainer_engine
        wanted = trainer, registry.find(trainer).trainer_settings(plan.device, "float32")
        collected = workers.run(wanted, "encode", job, self._progress, self._later(None))
        self._texts, self._run.manifest.special_token_ids = collected.texts, tuple(collected.special)
        if plan.recorded is not None:
            return []
        digest = hashlib.sha256(json.dumps([p.token_ids for p in collected.encoded]).encode()).hexdigest()
        prompts = self._run.manifest.prompts
        prompts.token_ids_sha256 = prompts.token_ids_sha256 or digest
        if prompts.token_ids_sha256 != digest:
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

    def _rollout(self, workers: Workers, rollout: PassId, encoded: list[EncodedPrompt]) -> None:
        pass_id, dtype = str(rollout), rollout.dtype
        if dtype == "recorded" or dtype == "float64" or self._settled(pass_id):
            return
        plan, sizes = self._plan, self._plan.sizes
        try:
            requests = plan.requests(dtype, encoded) if rollout.kind == "decode" else self._replay_requests()
        except EngineError as error:
            self._fail(pass_id, error)
            return
        sampling = Sampling(
            max([sizes.max_tokens, *(len(request.forced_token_ids) for request in requests)]),
            plan.config.temperature,
            plan.config.seed,
        )
        longest = max(len(r.prompt_token_ids) + (len(r.forced_token_ids) or sizes.max_tokens) for r in requests)
        capture = self._rows.capture(pass_id, requests, sampling)

        job = RolloutJob(
            engine=plan.engine(rollout).name,
            model_path=str(plan.model.path),
            dtype=dtype,
            device=plan.device,
            sampling=sampling,
            requests=requests,
            batch=sizes.rollout_batch,
            self_noise_tokens=sizes.self_noise_tokens,
            max_model_len=min(longest, plan.model.context or longest),
            capture=capture,
            trust_remote_code=plan.config.trust_remote_code,
        )
        try:
            collected = self._sample(workers, rollout, job)
        except EngineError as error:
            self._fail(pass_id, error)
            return
        if not any(len(r.response_token_ids) for r in collected.rollouts):
            self._fail(pass_id, EngineError("The engine generated no tokens.", "Check the prompts and --max-tokens."))
            return
        record = PassRecord(
            status="finished",
            deterministic=devices.determinism(plan.device, in_process=self._in_process),
            in_process_failure=self._fallback,
        )
        if rollout.kind == "replay":
            assert plan.passes.source is not None
            store_replay(self._run, rollout, plan.passes.source, collected, record, self._masks)
            return
        samples = [(prompt.prompt_id, sample) for prompt in encoded for sample in range(sizes.samples_per_prompt)]
        store_rollouts(self._run, rollout, requests, samples, collected, record)

    def _sample(self, workers: Workers, rollout: PassId, job: RolloutJob) -> Collected:
        """Runs a rollout pass; where the engine fails in-process, once more in a process of its own."""
        in_process, failure = self._in_process, ""
        while True:
            wanted = self._process(rollout)
            arguments = {**wanted[1].arguments, **self._plan.config.engine_args}
            job = replace(job, in_process=self._in_process, arguments=arguments)
            try:
                collected = workers.run(wanted, str(rollout), job, self._progress, self._later(str(rollout)))
            except EngineError as error:
                again = self._in_process and self._plan.engine(rollout).own_process
                if again and isinstance(error, UnexpectedEngineError):
                    self._progress.message("the engine failed in-process; trying a process of its own")
                    self._in_process, failure = False, error.what
                    continue
                self._in_process = in_process  # the process was not to blame, so the next dtype starts as this one did
                raise
            # Some architectures run only in vLLM's own engine process; the rest of this run goes there at once.
            self._fallback = failure or self._fallback
            return collected

    def _replay_requests(self) -> list[RolloutRequest]:
        """The sequences of the pass that the others follow, each to be decoded again."""
        source = str(self._plan.passes.source)
        known = self._run.record_of(source)
        if known is not None and known.status == "unsupported":
            raise DtypeRefused(
                f"{source} is unsupported, so there is nothing to decode again.",
                "Name a dtype that can sample first in --rollout-dtypes.",
            )
        if not self._run.finished(source):
            raise EngineError(
                f"{source} has not finished, so there is nothing to decode again.",
                "Fix that pass and continue with --resume.",
            )
        table = self._run.sequences(source)
        columns = (table[name].to_pylist() for name in ("sequence_id", "prompt_token_ids", "response_token_ids"))
        prompts = zip(table["prompt_id"].to_pylist(), table["sample_id"].to_pylist(), strict=True)
        return [
            RolloutRequest(sequence_id, prompt, request_seed(self._plan.config.seed, name, sample), response)
            for (sequence_id, prompt, response), (name, sample) in zip(zip(*columns, strict=True), prompts, strict=True)
            if response
        ]

    def _train(self, workers: Workers, trainer: PassId) -> None:
        pass_id, run = str(trainer), self._run
        assert trainer.dtype != "recorded"
        assert trainer.mode == "cast" or trainer.mode == "autocast"
        known = run.record_of(pass_id)
        covered = () if known is None else known.covers
        missing = tuple(name for name in self._to_cover() if name not in covered)
        if not missing or (known is not None and known.status == "unsupported"):
            return
        sources = {run.source_of(name): None for name in missing}  # in order, each once
        distinct = distinct_requests([run.sequences(name) for name in sources])
        with_rows, exact = self._rows.positions(missing, distinct)
        if known is not None and not with_rows and sources.keys() <= {run.source_of(name) for name in covered}:
            known.covers = covered + missing  # a replay of sequences that have been scored
            run.save()
            return
        kind, settings = self._process(trainer)
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
            self_noise_sequences=SELF_NOISE_SEQUENCES if self._plan.sizes.self_noise_tokens and not covered else 0,
            memory_budget=int(self._plan.sizes.memory_budget_gib * devices.GIB),
            exact_sources=[str(self._rows.path(name)) for name in with_rows],
            exact=exact,
            trust_remote_code=self._plan.config.trust_remote_code,
            flags=settings.arguments,
        )

        try:
            collected = workers.run((kind, settings), pass_id, job, self._progress, self._later(pass_id))
        except EngineError as error:
            self._fail(pass_id, error)
            return
        deterministic = devices.determinism(self._plan.device, in_process=True)
        record = PassRecord(status="finished", deterministic=deterministic, covers=covered + missing)
        store_scores(run, trainer, distinct, with_rows, collected, record, self._masks)

    def _to_cover(self) -> list[str]:
        """The finished passes whose sequences a trainer pass is to score."""
        passes = self._plan.passes
        wanted = dict.fromkeys((*passes.rollouts, *([passes.source] if passes.source is not None else [])))
        names = map(str, wanted)
        return [name for name in names if self._run.finished(name)]

    def _settled(self, pass_id: str) -> bool:
        """Whether a pass is finished or unsupported; one that failed is taken off the manifest first."""
        return self._run.record_of(pass_id) is not None

    def _fail(self, pass_id: str, error: EngineError) -> None:
        """Records the failure of one engine, which leaves the other passes to go on."""
        passes = self._run.manifest.passes
        if self._run.finished(pass_id):
            # A trainer pass that was to score later sequences, too, keeps what it has.
            passes[pass_id].extension_failure = error.what
        else:
            status: PassStatus = "unsupported" if isinstance(error, DtypeRefused) else "failed"
            passes[pass_id] = PassRecord(status=status, why=error.what, fix=error.fix)
        self._run.save()
        self._progress.end(pass_id, str(error))

    def _process(self, wanted: PassId) -> Wanted:
        """The engine of a pass, and the settings of its process."""
        plan = self._plan
        assert wanted.dtype != "recorded"
        engine = plan.engine(wanted)
        if wanted.side == "trainer":
            return engine.name, engine.trainer_settings(plan.device, wanted.dtype)
        assert wanted.dtype != "float64"
        return engine.name, engine.rollout_settings(
            plan.device,
            wanted.dtype,
            eager=plan.config.eager,
            in_process=self._in_process,
            kv_cache_gib=kv_cache_gib(plan),
        )

    def _later(self, current: str | None) -> list[Wanted]:
        """The processes of the passes after `current`, of all for None, that are still to run."""
        passes = self._plan.passes
        order = [p for p in (*passes.rollouts, *passes.scored) if not p.recorded]
        at = [str(p) for p in order].index(current) + 1 if current else 0
        return [self._process(p) for p in order[at:] if not self._settled(str(p))]
