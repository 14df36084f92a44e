"""What `diagnose --model` says of the bench's cases: the cause, found by experiments, beside the one that is true."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mismatch_probe.config.commands import DiagnoseSettings
from mismatch_probe.engines.base import Job
from mismatch_probe.engines.process import Listener
from mismatch_probe.probes.diagnose import models
from mismatch_probe.probes.diagnose.run import diagnose
from validation.faults.bench import Bench
from validation.faults.score import Entry, baseline_of, baselines, below_floor
from validation.faults.weights import save


@dataclass(frozen=True)
class Settled:
    """A case and what experiments say of it.

    Attributes:
        name: The case's.
        settled: As the document says it.
        cause: That is named; empty for none.
        as_well: Causes that the same columns would show.
        seconds: Of the experiments.
    """

    name: str
    settled: str
    cause: str
    as_well: tuple[str, ...]
    seconds: float


class InProcess:
    """Runs jobs here: to start a process takes longer than a case."""

    def __init__(self, *_: Any) -> None:
        self.send: Listener = print

    def run(self, job: Job, on_event: Listener, *, last: bool = True) -> None:
        self.send = on_event
        job.run(self)

    def phase(self, name: str) -> None:
        """Nobody asks."""

    def close(self) -> None:
        """Nothing was started."""


def settled(bench: Bench, name: str, path: Path, entry: Entry) -> Settled:
    """Diagnoses a case with the trainer's weights as the model; the checkpoint is the older one, or the base."""
    models.EngineProcess = InProcess  # type: ignore[misc, assignment]
    model = bench.model(entry["model"])
    weights = entry["trainer_weights"]
    plain = str(model.path)
    named, other = plain, {}
    if weights:
        named = str(bench.folder / "checkpoints" / f"{model.name}-{weights.replace(':', '_').replace('|', '+')}")
        if not Path(named).exists():
            save(bench.folder, model, weights, Path(named))
        # An update's past is the checkpoint; an adapter's is the base model.
        other = {"older_checkpoint" if weights.startswith("upd") else "base_model": plain}
    settings = DiagnoseSettings(model=named, trainer_dtype=entry["trainer_dtype"], **other)
    found = diagnose(str(path), settings).active
    assert found is not None
    cause = found.cause
    return Settled(
        name, found.settled, cause.name if cause else "", cause.as_well if cause else (), round(found.seconds, 2)
    )


def is_right(entry: Entry, one: Settled) -> bool:
    """Whether the cause is named, alone or with those that the same columns show; of no fault, numerics."""
    if entry["clean"]:
        return one.settled == "numerics"
    return entry["cause"] in (one.cause, *one.as_well)


def unsettled(entry: Entry) -> bool:
    """Whether a case has two causes, or one that no experiment can settle."""
    return "+" in entry["class"] or entry["class"] == "cannot-tell"


def read(path: Path) -> Iterator[Settled]:
    """Lines as `written`; none of a file that is not there."""
    for line in path.read_text().splitlines() if path.exists() else ():
        values = json.loads(line)
        yield Settled(**values | {"as_well": tuple(values["as_well"])})


def written(one: Settled) -> str:
    return json.dumps(asdict(one))


def summary(truth: Mapping[str, Entry], results: Sequence[Settled]) -> str:
    """What is right of faults that have one cause and are above their floor, and of clean cases; Markdown."""
    audits = baselines(truth)
    scored = [(truth[one.name], one) for one in results if one.name in truth]
    scored = [
        (e, one) for e, one in scored if e["clean"] or not (unsettled(e) or below_floor(e, baseline_of(audits, e)))
    ]
    faults, clean = ([(e, one) for e, one in scored if e["clean"] is kind] for kind in (False, True))
    by_fault = defaultdict(list)
    for entry, one in faults:
        by_fault[entry["fault"]].append(is_right(entry, one))
    right = sum(map(sum, by_fault.values()))
    first = sum(entry["cause"] == one.cause for entry, one in faults)
    lines = [
        f"- Right cause: {np.mean([np.mean(x) for x in by_fault.values()]):.1%} over {len(by_fault)} faults, "
        f"{right} of {len(faults)} cases; alone or first of those that columns cannot tell apart in {first}.",
        f"- No fault settled: {sum(is_right(e, one) for e, one in clean)} of {len(clean)} clean cases.",
        f"- Seconds: {np.median([one.seconds for _, one in scored]):.1f} (median), "
        f"{max(one.seconds for _, one in scored):.0f} (most).",
        "",
        "| cause | cases | right | named instead |",
        "|---|---|---|---|",
    ]
    for name in sorted({entry["cause"] for entry, _ in scored}):
        of_cause = [(e, one) for e, one in scored if e["cause"] == name]
        wrong = [f"{one.cause or one.settled} ({one.name})" for e, one in of_cause if not is_right(e, one)]
        lines.append(f"| {name} | {len(of_cause)} | {len(of_cause) - len(wrong)} | {'; '.join(wrong)} |")
    return "\n".join(lines)
