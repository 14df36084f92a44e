"""A trainer's process in a diagnosis: recorded ids under one change after another, on one model loaded once.

Nothing here imports torch before the job runs.

Shape legend: `N` tokens that count, `S` sequences.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices, faults
from mismatch_probe.engines.attribute.variants import NotThereError
from mismatch_probe.engines.base import Channel, OnTrainer, TrainerEngine
from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.engines.events import Advance, Column, Identity, Total
from mismatch_probe.errors import EngineError
from mismatch_probe.metrics.hypotheses import Target
from mismatch_probe.types import ScoreRequest

Floats = NDArray[np.float64]
_held: dict[str, TrainerEngine] = {}


@dataclass(frozen=True)
class ColumnsJob(OnTrainer):
    """Makes a column of log-probs of every change, in order, until one of them is what a side recorded.

    Attributes:
        trainer: The trainer; its requests are left empty.
        sequences: `S`, numbered from 0.
        counts: By sequence, which response tokens count, `[N]` in all.
        changes: What to do.
        facts: Whether facts of the rows of logits are kept of each column.
        targets: What ends the job, see `Target`.
        adapter: Folder of an adapter that is merged into the weights.
        donor: Folder of a checkpoint whose layers take the place of the model's own where a change says so.
    """

    sequences: Sequence[ScoreRequest]
    counts: Sequence[NDArray[np.bool_]]
    changes: Sequence[ForwardChange]
    facts: bool = False
    targets: Sequence[Target] = field(default=())
    adapter: str | None = None
    donor: str | None = None
    subject: ClassVar[str] = "The diagnosis's trainer"
    memory_advice: ClassVar[str] = "Diagnose with a lower --tokens, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in changes, a `Column` for each."""
        engine = self._engine()
        channel.phase("load")
        channel.send(Identity(engine.identity() | devices.running()))
        channel.send(Total(len(self.changes)))
        for change in self.changes:
            found = self._column(engine, change)
            channel.send(found)
            channel.send(Advance(1))
            if not found.why and any(target.met(found.logprobs) for target in self.targets):
                break
        channel.phase("columns")

    def _engine(self) -> TrainerEngine:
        """The trainer; that of the last job if it is the same, for loading takes longer than a pass."""
        from mismatch_probe.engines.diagnose.weights import merge_adapter

        wanted = repr((self.trainer, self.adapter))
        if wanted not in _held:
            _held.clear()
            engine = self.trainer.started()
            if self.adapter is not None:
                folder = self.adapter
                engine.run_on_model(lambda model: merge_adapter(model, folder))
            _held[wanted] = engine
        return _held[wanted]

    def _column(self, engine: TrainerEngine, change: ForwardChange) -> Column:
        """One pass; a change that the model does not allow leaves the reason."""
        started = time.perf_counter()
        try:
            logprobs, facts = self._pass(engine, change)
        except (NotThereError, EngineError) as error:
            why = error.what if isinstance(error, EngineError) else str(error)
        except Exception as error:  # one change that fails leaves the others
            why = faults.told(error, self)
        else:
            return Column(change.name, logprobs, facts, time.perf_counter() - started)
        return Column(change.name, np.empty(0), {}, time.perf_counter() - started, why)

    def _pass(self, engine: TrainerEngine, change: ForwardChange) -> tuple[Floats, Mapping[str, NDArray[Any]]]:
        from mismatch_probe.engines.diagnose.changes import applied
        from mismatch_probe.engines.diagnose.facts import RowFacts

        requests = [change.seen(request) for request in self.sequences]
        parts: dict[int, Floats] = {}
        facts: dict[int, Mapping[str, NDArray[Any]]] = {}
        with engine.changed(layout=change.layout or None), applied(engine, change, self.donor):
            for batch in self._batches(engine, change, requests):
                if self.facts:
                    for index, one in RowFacts(batch).of(engine):
                        kept = {name: values[self.counts[index]] for name, values in one.items()}
                        facts[index], parts[index] = kept, np.asarray(kept["logprob"], np.float64)
                else:
                    for score in engine.score(batch, 1.0):
                        values = np.asarray(score.logprobs, np.float64)
                        parts[score.sequence_id] = values[self.counts[score.sequence_id]]
        order = range(len(self.sequences))
        merged = {} if not facts else {name: stacked([facts[i][name] for i in order]) for name in facts[0]}
        return np.concatenate([parts[i] for i in order]), merged

    def _batches(
        self, engine: TrainerEngine, change: ForwardChange, requests: Sequence[ScoreRequest]
    ) -> list[list[ScoreRequest]]:
        if not change.groups:
            return engine.plan(requests)
        return [[requests[i] for i in group] for group in change.groups]


def stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows one below the other, the narrower ones filled up with NaN."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=0)
    if not width:
        return np.concatenate(parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts]
    )
