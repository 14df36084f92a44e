"""Measure the training-inference mismatch: how far a rollout engine and a trainer disagree about the same tokens.

Every command has a twin here. Importing this package imports no engine and no numeric library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mismatch_probe.errors import ProbeError
from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from mismatch_probe.config import CompareConfig
    from mismatch_probe.engines.models import ModelRef
    from mismatch_probe.probes.attribute.session import AttributeResult
    from mismatch_probe.probes.audit.session import AuditResult
    from mismatch_probe.probes.gradient.session import GradientResult
    from mismatch_probe.probes.planning import Plan
    from mismatch_probe.probes.progress import Progress
    from mismatch_probe.probes.session import RunResult
    from mismatch_probe.report.model import TokenSequence
    from mismatch_probe.results.attribution import AttributionPlan
    from mismatch_probe.results.preflight import Preflight
    from mismatch_probe.rl.config import RlConfig
    from mismatch_probe.rl.plan import PlannedRun
    from mismatch_probe.rl.run import RlResult
    from mismatch_probe.rl.sanity.run import SanityResult
    from mismatch_probe.rl.sweep_session import SweepResult

__all__ = [
    "CompareConfig",
    "ProbeError",
    "attribute",
    "attribute_plan",
    "attribute_resume",
    "attribute_run",
    "audit",
    "audit_resume",
    "audit_run",
    "compare",
    "env",
    "models",
    "plan",
    "plot",
    "preflight",
    "pull_model",
    "read_rl_config",
    "read_rl_plan",
    "resume",
    "rl_demo",
    "rl_gradient",
    "rl_report",
    "rl_resume",
    "rl_run",
    "rl_sanity_set",
    "rl_sanity_set_resume",
    "rl_sweep",
    "rl_sweep_resume",
    "tokens",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "CompareConfig":  # help needs no pydantic
        from mismatch_probe.config import CompareConfig

        return CompareConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def plan(config: CompareConfig, *, progress: Progress | None = None) -> Plan:
    """What `compare` would run, with every default filled in. No weights are fetched for it.

    Raises:
        ProbeError: The model, the prompts or the device cannot be had.
    """
    from mismatch_probe.probes.planning import make_plan

    return make_plan(config, progress, weights=False)


def compare(
    config: CompareConfig,
    *,
    out: str | Path | None = None,
    fail_on: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunResult:
    """Samples, scores and compares.

    Args:
        config: What to compare.
        out: A new folder for the run; by default one under `runs/` that is named after model and time.
        fail_on: Limits such as `"kl_k3>0.001@bfloat16"`.
        progress: Told about every pass.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished passes stay in the run directory.
    """
    from mismatch_probe.probes.session import new_run

    return new_run(config, out, fail_on, progress)


def resume(
    path: str | Path, *, fail_on: Sequence[str] = (), progress: Progress | None = None, **changes: Any
) -> RunResult:
    """Continues a run: finished passes are kept, the others are run.

    Args:
        path: The run directory.
        fail_on: Limits, as in `compare`.
        progress: Told about every pass.
        changes: Fields of `CompareConfig` that may still change: `memory_budget_gib`, `predict_lengths` and
            `extrapolate` at any time, the trainer's layout and attention until a trainer pass is finished, the rollout
            engine's batch, arguments, `eager` and `exact_kl` until a rollout pass is.

    Raises:
        ProbeError: The folder holds no run, its model or prompts have changed, or a change comes too late.
    """
    from mismatch_probe.probes.session import resume_run

    return resume_run(Path(path), fail_on, progress, changes)


def write_report(
    path: str | Path,
    *,
    fail_on: Sequence[str] = (),
    predict_lengths: Sequence[int] | None = None,
    extrapolate: bool | None = None,
) -> RunResult:
    """Computes summary, figures and reports of a run again, from its tables: the command `report`.

    Args:
        path: The run directory.
        fail_on: Limits, as in `compare`.
        predict_lengths: Response lengths to predict; those of the run's configuration for None.
        extrapolate: Whether to predict beyond 8 times the observed length; likewise.

    Raises:
        TableError: A table is missing or corrupt.
    """
    from mismatch_probe.probes.session import report_run

    return report_run(Path(path), fail_on, predict_lengths, extrapolate)


def tokens(path: str | Path, sequence_id: int) -> tuple[TokenSequence, ...]:
    """The tokens of one sequence with log μ, log π, entropy and rank, in every pair of equal dtypes that has it.

    Raises:
        UsageError: No compared pair has the sequence.
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    from mismatch_probe.probes.tokens import tokens_of
    from mismatch_probe.runs.comparison import RunDirectory

    return tokens_of(RunDirectory.open(Path(path)), sequence_id)


def plot(path: str | Path) -> dict[str, Path]:
    """Draws the figures of a run again, from its tables.

    Raises:
        TableError: A table is missing or corrupt.
    """
    from mismatch_probe.probes.session import plot_run

    return plot_run(Path(path))


def attribute(
    config: CompareConfig,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttributeResult:
    """Compares one pair of dtypes, then takes its gap apart: rungs, settings, layers, modules. The command `attribute`.

    Args:
        config: What to compare; its dtypes are those of `pair`.
        out: A new folder for the run; by default one under `runs/`.
        progress: Told about every pass.
        options: Fields of `config.AttributeOptions`: `pair`, `settings`, `layers`,
            `layer_dtypes`, `target`.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what is finished stays in the run directory.
    """
    from mismatch_probe.probes.attribute.session import new_attribution

    return new_attribution(config, out, options, progress)


def attribute_resume(path: str | Path, *, progress: Progress | None = None, **options: Any) -> AttributeResult:
    """Makes what is missing of an attribution of a run; works on any comparison that sampled, too. What failed is tried
    again.

    Args:
        path: The run directory.
        progress: Told about every pass.
        options: As in `attribute`; what is left out is as it was.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
        ProbeError: An engine failed.
    """
    from mismatch_probe.probes.attribute.session import resume_attribution

    return resume_attribution(Path(path), options, progress)


def attribute_run(path: str | Path, **options: Any) -> AttributeResult:
    """Computes an attribution again from what a run has, without an engine; arguments as in `attribute_resume`.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    from mismatch_probe.probes.attribute.session import attribute_again

    return attribute_again(Path(path), options)


def attribute_plan(config: CompareConfig, **options: Any) -> AttributionPlan:
    """What an attribution would run and what it would leave out, with the reason; loads nothing.

    Args:
        config: What to compare.
        options: As in `attribute`.

    Raises:
        ProbeError: The model is not there, or no engine is installed.
    """
    from mismatch_probe.probes.attribute.plan import plan_attribution

    return plan_attribution(config, options)


def audit(
    config: CompareConfig,
    *,
    out: str | Path | None = None,
    baseline: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AuditResult:
    """Compares, measures activations, gradients and engine lag, and judges: the command `audit`.

    Args:
        config: What to compare.
        out: A new folder for the run; by default one under `runs/`.
        baseline: An earlier `audit.json`, or the folder of its run, to compare with.
        progress: Told about every pass.
        options: Fields of `config.AuditOptions`: `profile`, `planned_tokens`, `step_tokens`,
            `learning_rates`, `pairs`, `strict`.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what is finished stays in the run directory.
    """
    from mismatch_probe.probes.audit.session import new_audit

    return new_audit(config, options, out, baseline, progress)


def audit_resume(
    path: str | Path, *, baseline: str | Path | None = None, progress: Progress | None = None, **options: Any
) -> AuditResult:
    """Runs what is missing of a comparison or an audit, and judges; arguments as in `audit`. Profile, lengths and rates
    that are not given are those of the run's last audit.

    Raises:
        ProbeError: The folder holds no run, its model has changed, or an engine failed.
    """
    from mismatch_probe.probes.audit.session import resume_audit

    return resume_audit(Path(path), options, baseline, progress)


def audit_run(path: str | Path, *, baseline: str | Path | None = None, **options: Any) -> AuditResult:
    """Judges a finished comparison without an engine, as far as it goes, and says what is missing; arguments as in
    `audit_resume`.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    from mismatch_probe.probes.audit.session import audit_run as judge

    return judge(Path(path), options, baseline)


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


def preflight(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prompts: str | None = None,
    chat: bool = False,
    max_tokens: int | None = None,
    rollout_dtypes: Sequence[str] = DTYPES,
    trainer_attn: str | None = None,
    device: str = "auto",
) -> Preflight:
    """What of a checkpoint will fail or surprise, from headers and configuration alone. Starts no engine.

    Args:
        model: Built-in name, checkpoint folder, or hub id; what is not on this disk is fetched first.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code of the checkpoint would be allowed to run.
        prompts: Prompt file; without one nothing about prompts is checked.
        chat: Whether plain prompts would be rendered by the chat template.
        max_tokens: Longest response; without it no length is checked.
        rollout_dtypes: What vLLM would run in.
        trainer_attn: Attention of transformers, None for its own choice.
        device: `auto`, `cpu`, or `cuda`.

    Raises:
        ProbeError: There is no such model, or the prompts cannot be read.
    """
    from mismatch_probe.engines.models import resolve
    from mismatch_probe.probes.preflight import Use, device_if_here
    from mismatch_probe.probes.preflight.run import preflight as run
    from mismatch_probe.prompts import load_prompts

    use = Use(
        rollout_dtypes=tuple(rollout_dtypes),
        attention=trainer_attn,
        trust_remote_code=trust_remote_code,
        chat=chat,
        prompts=load_prompts(prompts, None).prompts if prompts else (),
        max_tokens=max_tokens,
        device=device_if_here(device),
        bytes_per_weight=4.0 if "float32" in rollout_dtypes else 2.0,
    )
    return run(resolve(model, revision=revision, trust_remote_code=trust_remote_code), use)


def env() -> dict[str, Any]:
    """What is installed, and which engines and dtypes are usable here."""
    from mismatch_probe.engines.environment import inspect

    return inspect()


def read_rl_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RlConfig:
    """The configuration of an RL run, from a TOML file, from `overrides`, or from both, of which the latter win.

    Raises:
        UsageError: The file is no TOML, a key is unknown, or a value cannot be.
    """
    from mismatch_probe.config.toml import read_settings
    from mismatch_probe.results.rl_run import RlRun
    from mismatch_probe.rl.config import RlConfig

    values: Mapping[str, Any] = {}
    if path is not None:
        folder = Path(path)
        values = RlRun.read(folder / "run.json").config if folder.is_dir() else read_settings(path, RlConfig)
    return RlConfig.of({**values, **(overrides or {})})


def rl_run(config: RlConfig, *, out: str | Path | None = None, progress: Progress | None = None) -> RlResult:
    """Fine-tunes by RL and measures the mismatch at every step: the command `rl run`.

    Args:
        config: From `read_rl_config`.
        out: A new folder for the run; by default one under `runs/`.
        progress: Told about every step.

    Raises:
        ProbeError: See `mismatch_probe.errors`; checkpoints and finished steps stay in the folder.
    """
    from mismatch_probe.rl.run import new_rl_run

    return new_rl_run(config, out, progress)


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
    from mismatch_probe.rl.sweep_session import new_sweep

    return new_sweep(runs, out, workers, progress)


def rl_sweep_resume(path: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> SweepResult:
    """Continues a sweep: the runs that have not ended.

    Raises:
        ProbeError: The folder holds no sweep, or its model has changed.
    """
    from mismatch_probe.rl.sweep_session import resume_sweep

    return resume_sweep(Path(path), workers, progress)


def rl_demo(
    *, out: str | Path | None = None, seeds: int = 1, workers: int | None = None, progress: Progress | None = None
) -> SweepResult:
    """Three precisions and four doses of injected stress on the small model that comes with the tool.

    Raises:
        ProbeError: See `mismatch_probe.errors`; what has ended stays in the folder.
    """
    from mismatch_probe.rl.plan import demo_runs
    from mismatch_probe.rl.sweep_session import new_sweep

    return new_sweep(demo_runs(seeds), out, workers, progress, kind="demo")


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
    from mismatch_probe.rl.records import RlDirectory
    from mismatch_probe.rl.run import write_rl_run
    from mismatch_probe.rl.sweep import SweepDirectory
    from mismatch_probe.rl.sweep_session import write_sweep
    from mismatch_probe.rl.sweep_summary import places_of
    from mismatch_probe.runs.folder import RL_RUN, kind_of

    folder = Path(path)
    if not place and kind_of(folder) is RL_RUN:
        return write_rl_run(RlDirectory.open(folder))
    directory = SweepDirectory.open(folder)
    config = directory.runs[0].config
    n = config.prompts_per_step * config.samples_per_prompt
    return write_sweep(directory, [found for run in place for found in places_of(Path(run), planned_tokens, n)])


def rl_sanity_set(*, out: str | Path | None = None, progress: Progress | None = None, **settings: Any) -> SanityResult:
    """Keeps the problems that a model solves sometimes: the command `rl sanity-set`.

    Args:
        out: A new folder; by default one under `runs/`.
        progress: Told how many tokens are done.
        settings: Fields of `rl.config.SanityConfig`, such as `model`, `task`, `problems`, `n_samples`, `keep`.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished chunks of problems stay in the folder.
    """
    from mismatch_probe.rl.config import SanityConfig
    from mismatch_probe.rl.sanity.run import new_sanity_set

    return new_sanity_set(SanityConfig.of(settings), out, progress)


def rl_sanity_set_resume(path: str | Path, *, progress: Progress | None = None) -> SanityResult:
    """Goes on with a sanity set: samples the chunks of problems that are missing.

    Raises:
        TableError: The folder holds no sanity set, or its model or problems have changed.
    """
    from mismatch_probe.rl.sanity.run import resume_sanity_set

    return resume_sanity_set(Path(path), progress)


def rl_gradient(
    source: str | Path | CompareConfig,
    *,
    out: str | Path | None = None,
    predict_lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> GradientResult:
    """What the mismatch does to the policy gradient of a batch, under each correction: the command `rl gradient`.

    Args:
        source: The folder of a finished comparison, or what to compare first.
        out: A new folder for that comparison; by default one under `runs/`.
        predict_lengths: Response lengths at which ESS is predicted; by default the longest that was asked for.
        progress: Told about every pass.

    Raises:
        ProbeError: See `mismatch_probe.errors`; finished passes stay in the run directory.
    """
    from mismatch_probe.probes.gradient.session import measure_gradient

    return measure_gradient(source, out, predict_lengths, progress)
