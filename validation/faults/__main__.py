"""`python -m validation.faults make OUT` and `… list`; see the package."""

from __future__ import annotations

import fcntl
import fnmatch
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import click

from validation.faults.catalog import FAULTS, NOT_MADE, RULE, Case, Made, cases
from validation.faults.models import ModelName

# Recordings of an engine before the cases that they suffice for are made; to start one takes a minute.
AT_ONCE = 400


@click.group()
def main() -> None:
    """Recorded runs with a known fault."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, default=["*"], help="Pattern of names of cases; can be given again.")
@click.option("--split", type=click.Choice(["dev", "test"]), help="One half.")
@click.option("--model", "name", default="*", help="Pattern of models.")
@click.option("--dtype", default="*", help="Pattern of dtypes.")
@click.option("--record/--no-record", default=True, help="Start engines; else only what recordings suffice for.")
@click.option("--score/--no-score", default=True, help="Make cases; else recordings only.")
def make(out: Path, only: tuple[str, ...], split: str | None, name: str, dtype: str, record: bool, score: bool) -> None:
    """Makes the cases that are not in OUT yet, one engine at a time."""
    import logging

    import torch

    from validation.faults.bench import Bench

    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Where cores are shared, two threads of small models mostly wait for each other: 60 times slower was measured.
    torch.set_num_threads(1)
    wanted = [
        case
        for case in cases()
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in only)
        and split in (None, case.split)
        and fnmatch.fnmatch(case.model, name)
        and fnmatch.fnmatch(case.dtype, dtype)
    ]
    bench = Bench(out)
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in wanted:
        groups[case.model, case.dtype].append(case)
    for group in groups.values():
        _make_group(bench, out, group, record=record, score=score)


def _make_group(bench: Any, out: Path, group: list[Case], *, record: bool, score: bool) -> None:
    """Some recordings, then the cases that they suffice for, and so on."""
    left = [case for case in group if not (out / f"{case.name}.jsonl").exists()]
    while left:
        missing, ready, left = _collected(bench, left)
        # Cases of the same weights one after the other, so that a model is loaded once.
        for case in ready if score else ():
            try:
                found = case.fault.make(bench, case.place, case.strength)
            except Exception as error:
                click.echo(f"FAILED {case.name}: {type(error).__name__}: {error}", err=True)
                continue
            _keep(out, case, found if isinstance(found, Made) else Made(found))
        if not record:
            return
        for recordings in missing.values():
            click.echo(f"{group[0].model} {group[0].dtype}: {len(recordings)} recordings")
            bench.record(list(recordings.values()), lambda text: click.echo(f"{time.strftime('%H:%M:%S')} {text}"))


def _collected(bench: Any, cases: list[Case]) -> tuple[dict[str, dict[str, Any]], list[Case], list[Case]]:
    """Recordings to make next, by the cache's dtype; the cases that need none; and those that wait."""
    from validation.faults.bench import Needed, Ready

    engines: dict[str, dict[str, Any]] = defaultdict(dict)
    ready, waiting = [], []
    bench.collecting = True
    for case in cases:
        try:
            case.fault.make(bench, case.place, case.strength)
        except Needed as needed:
            waiting.append(case)
            if sum(map(len, engines.values())) < AT_ONCE:
                for recording in needed.recordings:
                    engines[recording.kv_cache].setdefault(recording.key, recording)
        except Ready:
            ready.append(case)
    bench.collecting = False
    return engines, ready, waiting


def _keep(out: Path, case: Case, made: Made) -> None:
    """Writes the case, then what is true of it."""
    from validation.faults.edits import write

    write(out / f"{case.name}.jsonl", made.rows)
    with (out / "truth.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _note(out / "truth.json", case, made)


def _note(path: Path, case: Case, made: Made) -> None:
    from validation.faults.bench import spread

    truth = json.loads(path.read_text()) if path.exists() else {"rule": RULE, "cases": {}}
    kept = {name: entry for name, entry in truth["cases"].items() if (path.parent / f"{name}.jsonl").exists()}
    measured = {
        "trainer_dtype": made.trainer_dtype or case.dtype,
        "note": made.note,
        "trainer_weights": made.trainer,
        "engine_weights": made.engine,
        "mean_abs_d": float(f"{spread(made.rows):.4g}"),
    }
    truth["cases"] = kept | {case.name: _stated(case) | measured}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(truth, indent=1))
    temporary.replace(path)
    click.echo(f"{time.strftime('%H:%M:%S')} {case.name} |d| {measured['mean_abs_d']}")


def _stated(case: Case) -> dict[str, Any]:
    """What the plan says of a case."""
    fault = case.fault
    return {
        "fault": fault.cause,
        "cause": case.cause,
        "class": fault.class_,
        "also": list(fault.also),
        "model": case.model,
        "dtype": case.dtype,
        "strength": str(case.strength),
        "split": case.split,
        "clean": fault.clean,
        "physical": fault.physical,
    }


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
def refresh(out: Path) -> None:
    """Says in truth.json what the plan says now, and drops cases whose file is not there."""
    planned = {case.name: case for case in cases()}
    with (out / "truth.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        truth = json.loads((out / "truth.json").read_text())
        truth["rule"] = RULE
        truth["cases"] = {
            name: entry | _stated(planned[name])
            for name, entry in truth["cases"].items()
            if name in planned and (out / f"{name}.jsonl").exists()
        }
        (out / "truth.tmp").write_text(json.dumps(truth, indent=1))
        (out / "truth.tmp").replace(out / "truth.json")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["dev", "test"]), required=True, help="Which half.")
@click.option("--only", multiple=True, default=["*"], help="Pattern of names of cases; can be given again.")
@click.option("--baseline/--no-baseline", default=True, help="Whether an audit of the model is given.")
def score(out: Path, results: Path, split: str, only: tuple[str, ...], baseline: bool) -> None:
    """Diagnoses the cases of OUT that are not in RESULTS yet (JSON lines), and prints what is right."""
    from validation.faults import score as scoring

    truth = _truth(out)
    audits = scoring.baselines(truth) if baseline else {}

    def judge(name: str, entry: dict[str, Any]) -> tuple[Any, str]:
        one = scoring.judged(name, out / f"{name}.jsonl", entry, scoring.baseline_of(audits, entry))
        said = ", ".join(f"{a.name} {a.confidence:.2f}" for a in one.found) or one.outcome
        return one, f"({entry['class']}): {said}"

    chosen = {name: entry for name, entry in truth.items() if _wanted(name, entry, split, only)}
    _judge_all(scoring, truth, chosen, results, judge)


def _truth(out: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((out / "truth.json").read_text())["cases"]
    return found


def _wanted(name: str, entry: dict[str, Any], split: str, only: tuple[str, ...]) -> bool:
    return entry["split"] == split and any(fnmatch.fnmatch(name, one) for one in only)


def _judge_all(scoring: Any, truth: Any, chosen: Any, results: Path, judge: Any) -> None:
    """Judges what is chosen and not in the results yet, keeps each at once, and prints a summary of all."""
    done = list(scoring.read(results))
    names = {one.name for one in done}
    with results.open("a") as file:
        for name, entry in chosen.items():
            if name not in names:
                one, said = judge(name, entry)
                file.write(scoring.written(one) + "\n")
                file.flush()
                done.append(one)
                click.echo(f"{'' if scoring.is_right(entry, one) else 'WRONG '}{name} {said}")
    click.echo(scoring.summary(truth, done))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["dev", "test"]), required=True, help="Which half.")
@click.option("--only", multiple=True, default=["*"], help="Pattern of names of cases; can be given again.")
def causes(out: Path, results: Path, split: str, only: tuple[str, ...]) -> None:
    """The same with experiments on the trainer's model, and the causes that they name."""
    import torch

    from validation.faults import causes as scoring
    from validation.faults.bench import Bench

    torch.set_num_threads(1)
    truth, bench = _truth(out), Bench(out)

    def judge(name: str, entry: dict[str, Any]) -> tuple[Any, str]:
        one = scoring.settled(bench, name, out / f"{name}.jsonl", entry)
        return one, f"({entry['cause']}): {one.cause or one.settled}"

    chosen = {
        name: entry
        for name, entry in truth.items()
        if _wanted(name, entry, split, only) and not scoring.unsettled(entry)
    }
    _judge_all(scoring, truth, chosen, results, judge)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
def calibrate(out: Path, results: tuple[Path, ...]) -> None:
    """Fits the weights of `confidence` to RESULTS of the development half."""
    from mismatch_probe.probes.diagnose.confidence import FEATURES
    from validation.faults import score as scoring
    from validation.faults.calibrate import answers, fitted

    truth = _truth(out)
    rows = answers(truth, [one for path in results for one in scoring.read(path)])
    click.echo(f"{len(rows)} answers, {sum(row.right for row in rows)} of them right")
    for name, weight in zip(("constant", *FEATURES), fitted(rows), strict=True):
        click.echo(f"  {weight:8.3f}  {name}")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("weights")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint(out: Path, name: ModelName, weights: str, folder: Path) -> None:
    """Writes weights of truth.json (`trainer_weights`, `engine_weights`) as a checkpoint folder."""
    from validation.faults.bench import Bench
    from validation.faults.weights import save

    save(out, Bench(out).model(name), weights, folder)


@main.command("list")
def list_() -> None:
    """Faults, classes and how many cases each half has."""
    counts = Counter((case.fault.cause, case.fault.class_, case.split) for case in cases())
    click.echo(f"{'cause':<32} {'class':<20} {'dev':>4} {'test':>5}")
    for fault in FAULTS:
        dev, test = (counts[fault.cause, fault.class_, split] for split in ("dev", "test"))
        click.echo(f"{fault.cause:<32} {fault.class_:<20} {dev:>4} {test:>5}{'  (no fault)' if fault.clean else ''}")
    for kind in (False, True):
        dev, test = (
            sum(case.fault.clean is kind and case.split == split for case in cases()) for split in ("dev", "test")
        )
        click.echo(f"{'clean' if kind else 'faults':<53} {dev:>4} {test:>5}")
    click.echo(f"\nSplit: {RULE}.\n\nNot made:")
    for cause, reason in NOT_MADE.items():
        click.echo(f"  {cause}: {reason}")


if __name__ == "__main__":
    main()
