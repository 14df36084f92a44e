"""Where recordings and scores of a bench are kept, and how cases get them: each is made once."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.types import Dtype
from validation.faults import models
from validation.faults.edits import Row
from validation.faults.models import Model, ModelName, Split
from validation.faults.record import Recorded, Recording, read
from validation.faults.trainer import Trainer, View

Floats = NDArray[np.float64]
_SIZES: Mapping[ModelName, dict[str, int]] = {
    "smollm2": {"count": 48, "tokens": 40},
    "chain": {"count": 80, "tokens": 64},
    "mixture": {"count": 80, "tokens": 64},
    "absolute": {"count": 80, "tokens": 64},
}


class Needed(Exception):
    """Recordings are missing."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        super().__init__(f"{len(recordings)} recordings")
        self.recordings = recordings


class Ready(Exception):
    """All recordings of a case are there; nothing was scored."""


@dataclass(frozen=True)
class Place:
    """What a case is of: model, dtype of the engine, half."""

    model: ModelName
    dtype: Dtype
    split: Split

    def recording(self, **options: Any) -> Recording:
        """The plain recording, with options; halves differ in prompts and seeds."""
        seed = {"dev": 1_000_000, "test": 3_000_000}[self.split] + options.pop("seed", 0)
        return Recording(self.model, self.dtype, self.split, **({**_SIZES[self.model], "seed": seed} | options))

    def view(self, **options: Any) -> View:
        """The right trainer in the engine's dtype, with options."""
        return View(**({"dtype": self.dtype} | options))


class Bench:
    """Recordings and scores in a folder.

    Args:
        folder: The bench's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.collecting = False
        self._trainer = Trainer(folder)
        self._recorded: dict[str, list[Recorded]] = {}
        for name in ("recordings", "scores", "weights", "models"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def model(self, name: ModelName) -> Model:
        return models.model(name, self.folder / "models")

    def need(self, recordings: Iterable[Recording]) -> None:
        """Asks for several recordings at once.

        Raises:
            Needed: Some are not there.
        """
        missing = [r for r in recordings if not self._path(r).exists()]
        if missing:
            raise Needed(missing)

    def recorded(self, recording: Recording) -> list[Recorded]:
        self.need([recording])
        if recording.key not in self._recorded:
            self._recorded[recording.key] = read(self._path(recording))
        return self._recorded[recording.key]

    def score(self, recording: Recording, view: View) -> list[Floats]:
        """The trainer's log-probs of a recording's responses."""
        rows = self.recorded(recording)
        sequences = [(row.prompt, row.response) for row in rows]
        return self.score_ids(recording.model, recording.key, view, sequences)

    def score_ids(
        self, name: ModelName, key: str, view: View, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Floats]:
        """The same of any sequences, under a key of theirs."""
        if self.collecting:
            raise Ready
        path = self.folder / "scores" / f"{key}-{view.key}.npz"
        if path.exists():
            with np.load(path) as kept:
                ends = np.cumsum(kept["lengths"])[:-1]
                return np.split(kept["values"], ends)
        found = self._trainer.score(self.model(name), view, sequences)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, lengths=[len(x) for x in found], values=np.concatenate(found))
        os.replace(temporary, path)
        return found

    def rows(self, recording: Recording, view: View) -> list[Row]:
        """Rows as a dump has them, without what only some dumps have."""
        scores = self.score(recording, view)
        return [
            Row(
                row.prompt,
                row.response,
                np.array(row.logprobs),
                a,
                {"prompt_id": row.prompt_id, "finish_reason": row.finish_reason},
            )
            for row, a in zip(self.recorded(recording), scores, strict=True)
        ]

    def _path(self, recording: Recording) -> Path:
        return self.folder / "recordings" / f"{recording.key}.json"

    def record(self, recordings: Sequence[Recording], log: Any) -> None:
        """Makes recordings of one engine, alone on this machine."""
        import fcntl

        from mismatch_probe.engines.process import EngineProcess
        from mismatch_probe.engines.vllm.settings import rollout_settings
        from validation.faults.record import RecordJob
        from validation.faults.weights import trained

        first = recordings[0]
        model = self.model(first.model)
        for recording in recordings:
            for name in recording.needs:
                for change in name.split("|"):
                    if change.startswith("upd:"):
                        _, rate, count = change.split(":")
                        trained(self.folder, model, rate, int(count))
        settings = rollout_settings("cpu", first.dtype, eager=True, in_process=True, kv_cache_gib=1)
        with (Path(tempfile.gettempdir()) / "mismatch-probe-faults.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # On one thread: where cores are shared, two mostly wait for each other.
            threads = "1"
            environment = settings.environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
            process = EngineProcess("vllm", environment, self.folder / "logs" / f"{first.model}.log")
            try:
                process.run(
                    RecordJob(model, list(recordings), str(self.folder)),
                    lambda event: log(event.text) if hasattr(event, "text") else None,
                )
            finally:
                process.close()


def commit() -> str:
    """Of the source that made the bench."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=models.ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def spread(rows: Sequence[Row]) -> float:
    """Mean |d| over tokens that count, nats; what is not finite is left out."""
    d = np.concatenate(
        [(row.a - row.b)[np.asarray(row.keys.get("loss_mask", np.ones(len(row.a)))) == 1] for row in rows]
    )
    return float(np.abs(d[np.isfinite(d)]).mean())


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    return [row for part in parts for row in part]


def stepped(rows: Sequence[Row], step: int, **keys: Any) -> list[Row]:
    return [row.with_keys(step=step, **keys) for row in rows]


def paired(rows: Sequence[Row], name: str, values: Sequence[Floats]) -> list[Row]:
    """Another column per token."""
    return [row.with_keys(**{name: column}) for row, column in zip(rows, values, strict=True)]
