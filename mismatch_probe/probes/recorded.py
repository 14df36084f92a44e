"""A dump (`--from DUMP`) as passes of a comparison: its sequences and the log-probs that it brings."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mismatch_probe.config import CompareConfig, DumpSettings
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.errors import IngestError, TableError
from mismatch_probe.files import atomic_path, locked, writing
from mismatch_probe.ingest.keys import IDS, RESPONSE
from mismatch_probe.ingest.read import ReadOptions, parse_map, read_dump
from mismatch_probe.ingest.recording import FILE, Recording, lists_of
from mismatch_probe.passes import RECORDED_ROLLOUT, RECORDED_TRAINER, PassId
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.recorded import ingest_report
from mismatch_probe.report.render import write_report
from mismatch_probe.results.dump import Dump, Recorded
from mismatch_probe.results.manifest import PassRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import DUMP, kind_of, refuse_occupied, run_folder
from mismatch_probe.runs.passes import RECORDED_KEYS
from mismatch_probe.schemas import Masks, sequences_table, tokens_table
from mismatch_probe.types import Rollout, RolloutRequest, Score


@dataclass(frozen=True)
class Scratch(Recording):
    """A recording in a hidden folder of its own, which vanishes with it."""


@dataclass(frozen=True)
class Ingested:
    """A dump in a folder of its own.

    Attributes:
        path: The folder.
        document: What it holds, the content of `recorded.json`.
    """

    path: Path
    document: Dump


def ingest(path: str, out: str | Path | None, settings: DumpSettings, progress: Progress | None = None) -> Ingested:
    """Reads a dump into a folder of its own: `mismatch_probe.read_dump`.

    Raises:
        IngestError: Nothing there can be read.
        UsageError: The folder exists and is not empty.
    """
    folder = run_folder(out, path)
    refuse_occupied(folder)
    scratch = _read(path, folder, settings, progress or Progress())
    with locked(folder):
        refuse_occupied(folder)
        recorded = _placed(scratch, folder / FILE).recorded
        document = Dump(**Dump.stamp(), created=time.strftime("%Y-%m-%dT%H:%M:%S%z"), recorded=recorded)
        document.write(folder / DUMP.file)
        write_report(ingest_report(document, folder), {}, folder)
    return Ingested(folder, document)


def open_recording(config: CompareConfig, out: str | Path | None, progress: Progress) -> Recording | None:
    """The sequences of `--from`; None without. A folder of `ingest` is taken as it is, another dump is read.

    Args:
        config: What was asked for.
        out: Folder of the run, None for one under `runs/`; where it has the sequences already, the dump is not read.
        progress: Told what takes long.

    Raises:
        IngestError: The dump cannot be read.
    """
    if config.source is None:
        return None
    source, folder = Path(config.source).expanduser(), run_folder(out, config.source)
    if (folder / FILE).exists() and (folder / RunDirectory.KIND.file).exists():
        recorded = RunDirectory.open(folder).manifest.recorded
        if recorded is not None:
            return Recording(folder / FILE, recorded)
    return _ingested(source) or _read(config.source, folder, config, progress, _vocabulary(config))


def open_dump(source: str, settings: DumpSettings, progress: Progress) -> Recording:
    """The sequences of a dump, of the folder of `ingest`, or of a comparison of a dump.

    Nothing is kept, so a dump is read into the system's folder of temporary files.

    Raises:
        IngestError: The dump cannot be read.
        TableError: It is the folder of a run without recorded sequences.
    """
    folder = Path(source).expanduser()
    kind = kind_of(folder)
    if kind in (None, DUMP):
        return _ingested(folder) or _read(source, Path(tempfile.gettempdir()) / "run", settings, progress)
    recorded = RunDirectory.open(folder).manifest.recorded
    if recorded is None or not (folder / FILE).exists():
        raise TableError(
            f"{folder} holds no recorded sequences.",
            "Give a dump, or the folder of `ingest` or of `compare --from` a dump.",
        )
    return Recording(folder / FILE, recorded)


def _ingested(source: Path) -> Recording | None:
    """The sequences of a folder of `ingest`; None where it is none."""
    return Recording(source / FILE, Dump.read(source / DUMP.file).recorded) if DUMP.held_by(source) else None


def _vocabulary(config: CompareConfig) -> int | None:
    """How many ids the model has that sampled recorded sequences; None where it is not named."""
    if not config.model:
        return None
    model = resolve(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code, weights=False)
    return int(model.text_config["vocab_size"]) if model.config else None


def _read(
    source: str, folder: Path, settings: DumpSettings, progress: Progress, vocabulary: int | None = None
) -> Scratch:
    """A dump, read into a hidden folder on the disk of a run's folder."""
    options = ReadOptions(settings.dump_format, parse_map(settings.dump_map), settings.trust_pickle)
    parent = next(one for one in folder.absolute().parents if one.exists())
    with writing(parent):
        hidden = Path(tempfile.mkdtemp(prefix=".mismatch-probe-", dir=parent))
    progress.message(f"reading {source}")
    try:
        found = Scratch(hidden / FILE, read_dump(source, hidden / FILE, options, progress.message, vocabulary))
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, hidden, ignore_errors=True)
    return found


def kept(recording: Recording, run: RunDirectory) -> Recording:
    """The same sequences in the run's own folder, so that it goes on without the dump."""
    file = run.path / FILE
    return recording if recording.path == file else _placed(recording, file)


def _placed(recording: Recording, file: Path) -> Recording:
    """The same sequences at another place, never half of them."""
    try:
        (os.replace if isinstance(recording, Scratch) else os.link)(recording.path, file)
    except OSError:  # on another disk
        with atomic_path(file) as temporary:
            shutil.copyfile(recording.path, temporary)
    if isinstance(recording, Scratch):
        shutil.rmtree(recording.path.parent, ignore_errors=True)
    return Recording(file, recording.recorded)


def check_recorded(recording: Recording, model: ModelRef) -> None:
    """Checks that a model's engines can take the recorded ids; without a model there is nothing to check.

    Raises:
        IngestError: An id is not in its vocabulary, a sequence is longer than its context, or a prompt is empty.
    """
    if not model.config:
        return
    facts = recording.recorded.file
    vocabulary = int(model.text_config["vocab_size"])
    if facts.n_empty_prompts:
        raise IngestError(
            f"{_first(recording, lambda prompt, response: len(prompt) == 0)} has an empty prompt, and an engine needs "
            "something before the first token.",
            "Give at least a begin-of-sequence token.",
        )
    if facts.largest_id >= vocabulary:
        where = _first(recording, lambda p, r: max(p.max(initial=0), r.max(initial=0)) >= vocabulary)
        raise IngestError(
            f"{where} has an id beyond the vocabulary of {model.name} ({vocabulary}).",
            "Name with --model the model that sampled these sequences.",
        )
    if model.context is not None and facts.longest_sequence > model.context:
        where = _first(recording, lambda p, r: len(p) + len(r) == facts.longest_sequence)
        raise IngestError(
            f"{where} has {facts.longest_sequence} tokens; the context of {model.name} is {model.context}.",
            "Take it out of the file, or name another --model.",
        )


def _first(recording: Recording, wanted: Callable[[NDArray[np.int32], NDArray[np.int32]], bool]) -> str:
    """Where the first sequence is whose ids are wanted."""
    for batch in recording.batches([*IDS, "file", "row"]):
        for index, (prompt, response) in enumerate(zip(*(lists_of(batch.column(key)) for key in IDS), strict=True)):
            if wanted(prompt, response):
                return f"Row {batch.column('row')[index].as_py()} of {batch.column('file')[index].as_py()}"
    raise AssertionError("no sequence is what the facts say of one")


def masks_of(recording: Recording | None) -> Masks | None:
    """Which response tokens count, by sequence; None where all do."""
    return dict(enumerate(recording.masks())) if recording is not None and recording.masked else None


def store_recorded(run: RunDirectory, recording: Recording, texts: Mapping[int, str]) -> None:
    """Finishes the passes that a dump brings; the first holds the sequences."""
    source = ""
    for wanted in _passes(recording.recorded):
        pass_id = str(wanted)
        if run.finished(pass_id):
            source = source or pass_id
            continue
        counts = {"n_nonfinite": 0}
        tables: dict[str, pa.Table | Iterator[pa.Table]] = {"tokens": _tokens(recording, wanted, texts, counts)}
        record = PassRecord(status="finished", sequences_of=source)
        if wanted != RECORDED_ROLLOUT:
            record.covers = (source or pass_id,)
        if not source:
            tables["sequences"] = _sequences(recording, pass_id)
            source = pass_id
        record.counts = counts  # filled while the tables are written
        run.finish_pass(pass_id, record, tables)


def _passes(recorded: Recorded) -> list[PassId]:
    """What a dump brings; of ids alone one pass that holds the sequences, without log-probs."""
    found = [one for one, key in RECORDED_KEYS.items() if key in recorded.file.keys]
    return found if recorded.rollout or recorded.trainer else [RECORDED_ROLLOUT, *found]


def _tokens(
    recording: Recording, wanted: PassId, texts: Mapping[int, str], counts: dict[str, int]
) -> Iterator[pa.Table]:
    facts = recording.recorded.file
    own = [RECORDED_KEYS[wanted], *(["trainer_entropy"] if wanted == RECORDED_TRAINER else []), "loss_mask"]
    columns = [key for key in own if key in facts.keys]
    counts |= {
        "n_sequences": facts.n_sequences,
        "n_tokens": facts.n_tokens - facts.n_masked_tokens,
        "n_dropped": facts.n_masked_tokens,
        "n_empty": facts.n_empty_responses,
    }
    first = 0
    for batch in recording.batches([RESPONSE, *columns]):
        numbers = range(first, first + batch.num_rows)
        found = {key: dict(zip(numbers, lists_of(batch.column(key)), strict=True)) for key in (RESPONSE, *columns)}
        ids, masks = found[RESPONSE], found.get("loss_mask")
        logprobs = found.get(own[0]) or {i: np.full(len(one), np.nan) for i, one in ids.items()}
        entropies = found.get("trainer_entropy", {})
        items = [Score(i, logprobs[i], entropies.get(i)) for i in numbers]
        counts["n_nonfinite"] += int(sum(np.count_nonzero(~np.isfinite(one)) for one in logprobs.values()))
        yield tokens_table(str(wanted), items, partial(_ids_of, ids), texts.get, masks=masks)
        first += batch.num_rows


def _ids_of(ids: Mapping[int, NDArray[np.int32]], item: Score) -> NDArray[np.int32]:
    return ids[item.sequence_id]


def _sequences(recording: Recording, pass_id: str) -> Iterator[pa.Table]:
    step = ["step"] if "step" in recording.recorded.file.keys else []
    first = 0
    for batch in recording.batches([*IDS, "prompt_id", "sample_id", "finish_reason", *step]):
        prompts, responses = (lists_of(batch.column(key)) for key in IDS)
        reasons = batch.column("finish_reason").to_pylist()
        numbers = range(first, first + len(prompts))
        yield sequences_table(
            pass_id,
            [RolloutRequest(i, prompt.tolist(), 0) for i, prompt in zip(numbers, prompts, strict=True)],
            [Rollout(i, ids, [], why or "") for i, ids, why in zip(numbers, responses, reasons, strict=True)],
            batch.column("prompt_id").to_pylist(),
            batch.column("sample_id").to_pylist(),
            batch.column("step").to_pylist() if step else None,
        )
        first += len(prompts)
