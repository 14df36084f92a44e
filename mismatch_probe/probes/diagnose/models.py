"""The models of an active diagnosis: worker processes that make columns of log-probs of recorded ids.

Shape legend: `N` tokens that count.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mismatch_probe.config.commands import DiagnoseSettings
from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.attribute.rollout import RolloutVariants
from mismatch_probe.engines.attribute.variants import PassKind
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.engines.diagnose.job import ColumnsJob
from mismatch_probe.engines.events import Column, Event
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import EngineError, UsageError
from mismatch_probe.ingest.recording import Recording
from mismatch_probe.metrics.hypotheses import Rows, Seen, Target
from mismatch_probe.probes.diagnose.evidence import Floats
from mismatch_probe.probes.diagnose.sample import Sample
from mismatch_probe.probes.own_pass import bare_trainer
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.recorded import check_recorded
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import ROLLOUT_ENGINE, TRAINER_ENGINE, Dtype, RolloutRequest, Sampling

_PLAIN = "plain"
_MOST_EMULATED = 2.0  # seconds of an FP32 pass that is made again in emulated BF16, which takes dozens of times longer


class Models:
    """Makes columns on the model, and on the others that were named.

    Args:
        settings: Which models.
        recording: The dump, whose ids must be the model's.
        progress: Told what is done.

    Attributes:
        vocabulary: Ids of the model.
        bos: Id that begins a sequence, None where there is none.
        n_layers: Decoder layers.
        low_dtype: Of the second plain pass, which shows what rounding makes.
    """

    def __init__(self, settings: DiagnoseSettings, recording: Recording, progress: Progress) -> None:
        self._settings, self._progress = settings, progress
        self._device = registry.find(TRAINER_ENGINE).choose_device(settings.device)
        self._logs = Path(tempfile.mkdtemp(prefix="mismatch-probe-"))
        self._process: tuple[Any, EngineProcess] | None = None
        named = {"model": settings.model, "older": settings.older_checkpoint, "base": settings.base_model}
        self._models = {name: self._resolved(path, recording) for name, path in named.items() if path}
        if settings.adapter is not None:
            self._models["adapter"] = self._models["model"]
        text = self._models["model"].text_config
        self.vocabulary = int(text["vocab_size"])
        bos = text.get("bos_token_id")
        self.bos = int(bos) if isinstance(bos, int) and bos < self.vocabulary else None
        self.n_layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
        self.low_dtype: Dtype = "bfloat16" if settings.trainer_dtype == "float32" else "float32"

    @property
    def given(self) -> frozenset[str]:
        """What else there is: `older`, `base`, `adapter`, `engine`."""
        engine = {"engine"} if self._settings.engine_dtype is not None else set[str]()
        return frozenset(self._models) - {"model"} | engine

    def __enter__(self) -> Models:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if error is None or not isinstance(error, EngineError):  # whose message names the log
            shutil.rmtree(self._logs, ignore_errors=True)

    def plain(self, sample: Sample) -> tuple[Rows, Floats | None]:
        """The plain pass, and log-probs `[N]` in another dtype; None where this machine is too slow for it."""
        seen = Seen.of(sample.ids, sample.counts)
        found = next(iter(self._run(sample, "model", [ForwardChange(_PLAIN)], facts=True)))
        if found.why:
            raise EngineError(
                f"The model cannot score the recorded ids: {found.why}.", "Look at the first error above."
            )
        rows = Rows.of(found.facts, seen)
        emulated = self.low_dtype == "bfloat16" and self._device == "cpu" and not devices.cpu_has_bf16()
        if emulated and found.seconds > _MOST_EMULATED:
            return rows, None
        low = next(iter(self._run(sample, "model", [ForwardChange(_PLAIN)], dtype=self.low_dtype)))
        return rows, None if low.why else low.logprobs

    def columns(
        self, sample: Sample, of: str, changes: Sequence[ForwardChange], targets: Sequence[Target]
    ) -> Iterator[tuple[ForwardChange, Floats | None, str, float]]:
        """Columns of changes, in order, up to the first that is what a side recorded.

        Args:
            sample: The sequences.
            of: `model`, `older`, `base`, `adapter` or `engine`.
            changes: What to do; of the engine, how it goes over the tokens.
            targets: What a column has to be, to be the last.
        """
        if of == "engine":
            yield from self._in_engine(sample, changes)
            return
        by_name = {change.name: change for change in changes}
        for found in self._run(sample, of, changes, targets=targets) if changes else ():
            yield by_name[found.name], None if found.why else found.logprobs, found.why, found.seconds

    def _in_engine(
        self, sample: Sample, changes: Sequence[ForwardChange]
    ) -> Iterator[tuple[ForwardChange, Floats | None, str, float]]:
        """Columns of passes of the rollout engine, whose process ends with them."""
        self._close()
        files = {change.name: Measurement(self._logs / f"{change.kind}.npz", "") for change in changes}
        rollout, environment = self._rollout(sample)
        kinds: dict[str, PassKind] = {change.name: change.kind for change in changes}  # type: ignore[misc]
        process = EngineProcess(rollout.engine, environment, self._logs / "engine.log")
        try:
            process.run(RolloutVariants(rollout, kinds, files, ()), lambda event: None)
        finally:
            process.close()
        counts = np.concatenate(sample.counts)
        for change in changes:
            found = files[change.name].load()
            assert found is not None  # the job ended
            facts, arrays = found
            why = str(facts.get("failed", ""))
            column = None if why else np.asarray(arrays["logprobs"], np.float64)[counts]
            yield change, column, why, float(facts.get("seconds", 0.0))

    def _rollout(self, sample: Sample) -> tuple[RolloutJob, Mapping[str, str]]:
        """The engine with the ids to go over, and its environment."""
        dtype, model = self._settings.engine_dtype, self._models["model"]
        assert dtype is not None
        settings = registry.find(ROLLOUT_ENGINE).rollout_settings(
            self._device, dtype, eager=self._device == "cpu", in_process=True, kv_cache_gib=1
        )
        requests = [
            RolloutRequest(one.sequence_id, list(one.prompt_token_ids), 0, tuple(one.response_token_ids))
            for one in sample.requests
        ]
        job = RolloutJob(
            engine=ROLLOUT_ENGINE,
            model_path=str(model.path),
            dtype=dtype,
            device=self._device,
            sampling=Sampling(max(len(one.forced_token_ids) for one in requests)),
            requests=requests,
            batch=len(requests),
            self_noise_tokens=0,
            max_model_len=1 + max(one.length for one in sample.requests),  # prefill has one token made behind
            trust_remote_code=self._settings.trust_remote_code,
            arguments=settings.arguments,
        )
        return job, settings.environment

    def _close(self) -> None:
        if self._process is not None:
            self._process[1].close()
            self._process = None

    def _run(
        self,
        sample: Sample,
        of: str,
        changes: Sequence[ForwardChange],
        *,
        facts: bool = False,
        targets: Sequence[Target] = (),
        dtype: Dtype | None = None,
    ) -> list[Column]:
        trainer = self._trainer(of, dtype or self._settings.trainer_dtype)
        job = ColumnsJob(
            trainer,
            sequences=sample.requests,
            counts=sample.counts,
            changes=changes,
            facts=facts,
            targets=targets,
            adapter=self._settings.adapter if of == "adapter" else None,
            donor=self._donor(of, changes),
        )
        found: list[Column] = []

        def on_event(event: Event) -> None:
            if isinstance(event, Column):
                found.append(event)

        self._worker(trainer).run(job, on_event, last=False)
        return found

    def _donor(self, of: str, changes: Sequence[ForwardChange]) -> str | None:
        """Whose layers changes borrow: those of an older checkpoint, or what an adapter or an update began with."""
        blended = any(change.kind == "blended" for change in changes)
        name = "model" if of == "adapter" else "base" if blended else "older"
        return str(self._models[name].path) if name in self._models else None

    def _worker(self, trainer: TrainerJob) -> EngineProcess:
        """The process; another one where its environment has to be another."""
        settings = registry.find(trainer.engine).trainer_settings(self._device, trainer.dtype)
        key = frozenset(settings.environment.items())
        if self._process is not None and self._process[0] != key:
            self._close()
        if self._process is None:
            process = EngineProcess(trainer.engine, settings.environment, self._logs / "diagnose.log")
            self._process = key, process
        return self._process[1]

    def _trainer(self, of: str, dtype: Dtype) -> TrainerJob:
        model, trust = self._models[of], self._settings.trust_remote_code
        return bare_trainer(TRAINER_ENGINE, model, dtype, self._device, trust)

    def _resolved(self, name: str, recording: Recording) -> ModelRef:
        settings = self._settings
        revision = settings.revision if name == settings.model else None
        model = resolve(
            name, revision=revision, trust_remote_code=settings.trust_remote_code, log=self._progress.message
        )
        if model.scripted:
            raise UsageError("The scripted model has no weights to experiment with.", "Name a real one.")
        check_recorded(recording, model)
        return model
