"""Measure the training-inference mismatch: how far a rollout engine and a trainer disagree about the same tokens.

Every command has a twin here. Settings are keyword arguments with the names of the command's options; `config` names a
TOML file or the folder of an earlier run whose settings the keywords override. Importing this package imports no
engine, no numeric library and no pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, Unpack

from mismatch_probe.errors import ProbeError
from mismatch_probe.run import Run

if TYPE_CHECKING:
    from mismatch_probe.config import Settings
    from mismatch_probe.engines.models import ModelRef
    from mismatch_probe.keywords import (
        AttributeKeywords,
        AuditKeywords,
        CompareKeywords,
        DiagnoseKeywords,
        DumpKeywords,
        GradientKeywords,
        PreflightKeywords,
        RlKeywords,
        SanityKeywords,
    )
    from mismatch_probe.probes.attribute.session import AttributeResult
    from mismatch_probe.probes.audit.session import AuditResult
    from mismatch_probe.probes.gradient.session import GradientResult
    from mismatch_probe.probes.planning import Plan
    from mismatch_probe.probes.progress import Progress
    from mismatch_probe.probes.recorded import Ingested
    from mismatch_probe.results.attribution import AttributionPlan
    from mismatch_probe.results.diagnosis import Diagnosis
    from mismatch_probe.results.explanation import Explanation
    from mismatch_probe.results.preflight import Preflight
    from mismatch_probe.rl.plan import PlannedRun
    from mismatch_probe.rl.run import RlResult
    from mismatch_probe.rl.sanity.run import SanityResult
    from mismatch_probe.rl.sweep import SweepResult

SettingsT = TypeVar("SettingsT", bound="Settings")

__all__ = [
    "ProbeError",
    "Run",
    "attribute",
    "attribute_plan",
    "audit",
    "compare",
    "diagnose",
    "env",
    "explain",
    "models",
    "plan",
    "preflight",
    "pull_model",
    "read_dump",
    "read_rl_plan",
    "rl_demo",
    "rl_gradient",
    "rl_report",
    "rl_resume",
    "rl_run",
    "rl_sanity_set",
    "rl_sanity_set_resume",
    "rl_sweep",
    "rl_sweep_resume",
]


def plan(
    *, config: str | Path | None = None, progress: Progress | None = None, **settings: Unpack[CompareKeywords]
) -> Plan:
    """What `compare` would run, with every default filled in. No weights are fetched for it.

    Raises:
        ProbeError: The model, the prompts or the device cannot be had.
    """
    from mismatch_probe.config import CompareConfig
    from mismatch_probe.probes.planning import make_plan

    return make_plan(_settings(CompareConfig, config, settings), progress, weights=False)


def compare(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    fail_on: str | Sequence[str] = (),
    progress: Progress | None = None,
    **settings: Unpack[CompareKeywords],
) -> Run:
    """Samples, scores and compares.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder for the run; by default one under `runs/` that is named after model and time.
        fail_on: Limits such as `"kl_k3>0.001@bfloat16"`.
        progress: Told about every pass.
        settings: Options of `compare`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished passes stay in the run directory.
    """
    from mismatch_probe.config import CompareConfig
    from mismatch_probe.config.commands import CompareSettings
    from mismatch_probe.probes.comparison import new_run

    given = {**settings, "fail_on": fail_on} if fail_on else settings
    asked = _settings(CompareSettings, config, given)
    return Run(new_run(asked.part(CompareConfig), out, asked.fail_on, progress))


def read_dump(
    path: str | Path,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[DumpKeywords],
) -> Ingested:
    """Reads what a framework dumped into a folder of its own: the command `ingest`.

    Args:
        path: A file, or a folder with many.
        out: A new folder; by default one under `runs/` that is named after dump and time.
        progress: Told which files are loaded whole.
        settings: Options of `ingest`, by name: see docs/cli.md.

    Raises:
        ProbeError: Nothing there can be read, or a row is not what its format promises.
    """
    from mismatch_probe.config import DumpSettings
    from mismatch_probe.probes.recorded import ingest

    return ingest(str(path), out, DumpSettings.of(settings), progress)


def attribute(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[AttributeKeywords],
) -> AttributeResult:
    """Compares one pair of dtypes, then attributes its gap: rungs, settings, layers, modules. The command `attribute`.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder for the run; by default one under `runs/`.
        progress: Told about every pass.
        settings: Options of `attribute`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what is finished stays in the run directory.
    """
    from mismatch_probe.config import AttributeOptions, CompareConfig
    from mismatch_probe.config.commands import AttributeSettings
    from mismatch_probe.probes.attribute.session import new_attribution

    asked = _settings(AttributeSettings, config, settings)
    return new_attribution(asked.part(CompareConfig), out, dict(asked.part(AttributeOptions)), progress)


def attribute_plan(*, config: str | Path | None = None, **settings: Unpack[AttributeKeywords]) -> AttributionPlan:
    """What an attribution would run and what it would leave out, with the reason; loads nothing.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        settings: As in `attribute`.

    Raises:
        ProbeError: The model is not there, or no engine is installed.
    """
    from mismatch_probe.config import AttributeOptions, CompareConfig
    from mismatch_probe.config.commands import AttributeSettings
    from mismatch_probe.probes.attribute.session import plan_attribution

    asked = _settings(AttributeSettings, config, settings)
    return plan_attribution(asked.part(CompareConfig), dict(asked.part(AttributeOptions)))


def audit(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[AuditKeywords],
) -> AuditResult:
    """Compares, measures activations, gradients and engine lag, and judges: the command `audit`.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder for the run; by default one under `runs/`.
        progress: Told about every pass.
        settings: Options of `audit`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what is finished stays in the run directory.
    """
    from mismatch_probe.config import AuditOptions, CompareConfig
    from mismatch_probe.config.commands import AuditSettings
    from mismatch_probe.probes.audit.session import new_audit

    asked = _settings(AuditSettings, config, settings)
    return new_audit(asked.part(CompareConfig), dict(asked.part(AuditOptions)), out, asked.baseline, progress)


def preflight(
    model: str | Path, *, config: str | Path | None = None, **settings: Unpack[PreflightKeywords]
) -> Preflight:
    """What of a checkpoint will fail or surprise, from headers and configuration alone. Starts no engine.

    Args:
        model: Built-in name, checkpoint folder, or hub id; what is not on this disk is fetched first.
        config: A TOML file, or the folder of an earlier run, with settings.
        settings: Options of `preflight`, by name: see docs/cli.md. Without prompts nothing about them is checked,
            without `max_tokens` no length.

    Raises:
        ProbeError: There is no such model, or the prompts cannot be read.
    """
    from mismatch_probe.config.commands import PreflightSettings
    from mismatch_probe.engines.models import resolve
    from mismatch_probe.probes.preflight import Use, device_if_here
    from mismatch_probe.probes.preflight.run import preflight as run
    from mismatch_probe.prompts import load_prompts

    asked = _settings(PreflightSettings, config, settings)
    use = Use(
        rollout_dtypes=asked.rollout_dtypes,
        attention=asked.trainer_attn,
        trust_remote_code=asked.trust_remote_code,
        chat=asked.chat,
        prompts=load_prompts(asked.prompts, None).prompts if asked.prompts else (),
        max_tokens=asked.max_tokens,
        device=device_if_here(asked.device, asked.rollout_engine),
        rollout_engine=asked.rollout_engine,
        bytes_per_weight=4.0 if "float32" in asked.rollout_dtypes else 2.0,
    )
    return run(resolve(str(model), revision=asked.revision, trust_remote_code=asked.trust_remote_code), use)


def explain(
    source: str | Path | BinaryIO, *, name: str | None = None, audit: str | Path | None = None, pair: str | None = None
) -> Explanation:
    """What the metrics that a training run logged say of its mismatch, without tokens. The command `explain`.

    Args:
        source: A log, JSON, JSON Lines, CSV or TensorBoard event file, a folder of event files, or an open binary
            stream.
        name: What messages call it; by default the path.
        audit: An `audit.json`, or its folder, to place sizes against.
        pair: The audit's pair, e.g. `"bf16/bf16"`; by default the one that its verdict is of.

    Raises:
        ProbeError: The file cannot be read or has no known metric, or there is no such audit or pair.
    """
    from mismatch_probe.probes.explain.run import explain as run

    called = name or (str(source) if isinstance(source, (str, Path)) else "the stream")
    return run(source, called, None if audit is None else str(audit), pair)


def diagnose(
    source: str | Path,
    *,
    audit: str | Path | None = None,
    pair: str | None = None,
    progress: Progress | None = None,
    **settings: Unpack[DiagnoseKeywords],
) -> Diagnosis:
    """Whether a dump's gap is numerics or a bug, and which kind. The command `diagnose`.

    Args:
        source: A dump with log-probs of both sides, the folder of `ingest`, or that of `compare` of a dump.
        audit: An `audit.json` of the model, or its folder: what rounding alone makes.
        pair: The audit's pair, e.g. `"bf16/bf16"`; by default the one that its verdict is of.
        progress: Told what takes long.
        settings: How the dump is read, and with which models its ids are scored again, by name: see docs/cli.md.

    Raises:
        ProbeError: The dump cannot be read or has one side only, or there is no such audit or pair.
    """
    from mismatch_probe.config.commands import DiagnoseSettings
    from mismatch_probe.probes.diagnose.run import diagnose as run

    return run(str(source), DiagnoseSettings.of(settings), None if audit is None else str(audit), pair, progress)


def models() -> dict[str, Path | None]:
    """Built-in models, with the folder of each one that has been fetched."""
    from mismatch_probe.engines.builtin import BUILTINS, builtin_path

    return {name: path if (path := builtin_path(entry)).is_dir() else None for name, entry in BUILTINS.items()}


def pull_model(name: str) -> ModelRef:
    """Fetches a built-in model or a hub id, or finds a local folder.

    Raises:
        ModelError: There is no such model, or it cannot be fetched.
    """
    from mismatch_probe.engines.models import resolve

    return resolve(name)


def env() -> dict[str, Any]:
    """What is installed, and which engines and dtypes are usable here."""
    from mismatch_probe.engines.environment import inspect

    return inspect()


def rl_run(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[RlKeywords],
) -> RlResult:
    """Fine-tunes by RL and measures the mismatch at every step: the command `rl run`.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder for the run; by default one under `runs/`.
        progress: Told about every step.
        settings: Options of `rl run`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; checkpoints and finished steps stay in the folder.
    """
    from mismatch_probe.rl.config import RlConfig
    from mismatch_probe.rl.run import new_rl_run

    return new_rl_run(_settings(RlConfig, config, settings), out, progress)


def rl_resume(path: str | Path, *, progress: Progress | None = None) -> RlResult:
    """Goes on with an RL run from its newest checkpoint.

    Raises:
        ProbeError: The folder holds no RL run, or its model has changed.
    """
    from mismatch_probe.rl.run import resume_rl_run

    return resume_rl_run(Path(path), progress)


def read_rl_plan(path: str | Path, *, seeds: int | None = None) -> list[PlannedRun]:
    """The runs of a sweep from a TOML file, or from the folder of an earlier sweep; see `rl sweep -h`.

    Args:
        path: The file or folder.
        seeds: Seeds 0 to `seeds` − 1 for every arm, in place of the plan's.

    Raises:
        UsageError: The file is no TOML, a key is unknown, or a value is invalid.
        TableError: The folder holds no sweep.
    """
    from mismatch_probe.rl.plan import read_plan

    return read_plan(path, seeds)


def rl_sweep(
    runs: Sequence[PlannedRun],
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Runs a plan, and compares its arms: the command `rl sweep`.

    Args:
        runs: From `read_rl_plan`.
        out: A new folder; by default one under `runs/`.
        workers: Runs at once; one per core or GPU for None.
        progress: Told about every run.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what has ended stays in the folder.
    """
    from mismatch_probe.rl.sweep import new_sweep

    return new_sweep(runs, out, workers, progress)


def rl_sweep_resume(path: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> SweepResult:
    """Continues a sweep: the runs that have not ended.

    Raises:
        ProbeError: The folder holds no sweep, or its model has changed.
    """
    from mismatch_probe.rl.sweep import resume_sweep

    return resume_sweep(Path(path), workers, progress)


def rl_demo(
    *, out: str | Path | None = None, seeds: int = 1, workers: int | None = None, progress: Progress | None = None
) -> SweepResult:
    """Three precisions, and BF16 without mismatch, on a model that comes with the tool, whose tokens are so uncertain
    that rounding in BF16 more than halves the effective sample size.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what has ended stays in the folder.
    """
    from mismatch_probe.files import data_path
    from mismatch_probe.rl.plan import read_plan
    from mismatch_probe.rl.sweep import new_sweep

    return new_sweep(read_plan(data_path("rl/demo.toml"), seeds), out, workers, progress, kind="demo")


def rl_report(
    path: str | Path, *, place: Sequence[str | Path] = (), planned_tokens: int = 1024
) -> SweepResult | RlResult:
    """Computes the report of a sweep or of an RL run again: the command `rl report`.

    Args:
        path: The folder of the sweep or of the run.
        place: Runs of `compare` whose models are placed among the arms of a sweep.
        planned_tokens: Response length at which their ESS is predicted.

    Raises:
        ProbeError: A folder holds neither sweep nor run.
    """
    from mismatch_probe.rl.records import RlDirectory, SweepDirectory
    from mismatch_probe.rl.run import write_rl_run
    from mismatch_probe.rl.sweep import write_sweep
    from mismatch_probe.rl.sweep_summary import places_of
    from mismatch_probe.runs.folder import RL_RUN, kind_of

    folder = Path(path)
    if not place and kind_of(folder) is RL_RUN:
        return write_rl_run(RlDirectory.open(folder))
    directory = SweepDirectory.open(folder)
    config = directory.runs[0].config
    n = config.prompts_per_step * config.samples_per_prompt
    return write_sweep(directory, [found for run in place for found in places_of(Path(run), planned_tokens, n)])


def rl_sanity_set(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[SanityKeywords],
) -> SanityResult:
    """Keeps the problems that a model solves sometimes: the command `rl sanity-set`.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder; by default one under `runs/`.
        progress: Told how many tokens are done.
        settings: Options of `rl sanity-set`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished chunks of problems stay in the folder.
    """
    from mismatch_probe.rl.config import SanityConfig
    from mismatch_probe.rl.sanity.run import new_sanity_set

    return new_sanity_set(_settings(SanityConfig, config, settings), out, progress)


def rl_sanity_set_resume(path: str | Path, *, progress: Progress | None = None) -> SanityResult:
    """Goes on with a sanity set: samples the chunks of problems that are missing.

    Raises:
        TableError: The folder holds no sanity set, or its model or problems have changed.
    """
    from mismatch_probe.rl.sanity.run import resume_sanity_set

    return resume_sanity_set(Path(path), progress)


def rl_gradient(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Unpack[GradientKeywords],
) -> GradientResult:
    """Compares, then measures what the mismatch does to the policy gradient of a batch: the command `rl gradient`.

    Args:
        config: A TOML file, or the folder of an earlier run, with settings.
        out: A new folder for the comparison; by default one under `runs/`.
        progress: Told about every pass.
        settings: Options of `rl gradient`, by name: see docs/cli.md.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished passes stay in the run directory.
    """
    from mismatch_probe.config import CompareConfig, GradientOptions
    from mismatch_probe.config.commands import GradientSettings
    from mismatch_probe.probes.gradient.session import new_gradient

    asked = _settings(GradientSettings, config, settings)
    comparison = asked.part(CompareConfig, without=GradientOptions)
    return new_gradient(comparison, out, asked.predict_lengths, progress)


def _settings(kind: type[SettingsT], config: str | Path | None, given: Mapping[str, Any]) -> SettingsT:
    """What was given, and the settings of `config` where it was not."""
    from mismatch_probe.runs.settings import values_from

    return kind.of({**values_from(config, kind), **given})
