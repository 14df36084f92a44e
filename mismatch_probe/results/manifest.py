"""The manifest of a run: what was asked for, with what, and what has become of every pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, JsonValue

from mismatch_probe.config import CompareConfig, Sizes
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.dump import Recorded

RunStatus = Literal["running", "interrupted", "failed", "incomplete", "complete"]
PassStatus = Literal["finished", "failed", "unsupported"]


class Record(Result):
    """A part of the manifest. A run fills it in while it goes on, so its fields can be assigned."""

    model_config = ConfigDict(frozen=False)


class Determinism(Result):
    """Whether a repeat of a pass on the same machine gives the same bits."""

    promised: bool
    """Whether that is promised."""
    why: str
    """Why it is, or is not."""


class PassRecord(Record):
    """What has become of a pass."""

    status: PassStatus
    """`failed` is tried again on resume; `unsupported`: the engine does not run this dtype, and is not asked again."""
    rows: dict[str, int] = {}
    """Rows of each table that the pass has: `tokens` or `reference`, `sequences`, `exact`."""
    repeats: str = ""
    """The pass of which this one produces some tokens a second time; empty for every other pass."""
    engine: dict[str, JsonValue] = {}
    """What the engine says of itself: name, dtype, flags, backends, versions, machine. Keys depend on the engine."""
    timings: dict[str, float] = {}
    """Seconds by phase: `import`, `wait`, `load`, `generate` or `score`, `self_noise`."""
    counts: dict[str, int] = {}
    """`n_sequences`, `n_tokens`, `n_nonfinite`, and where they apply `n_truncated`, `n_empty`, `n_dropped` (masked
    tokens), `n_distinct_sequences` (forward passes)."""
    deterministic: Determinism | None = None
    """Whether a repeat gives the same bits; None for a pass that no engine ran."""
    covers: tuple[str, ...] = ()
    """Of a trainer pass: the rollout passes whose sequences it has scored."""
    sequences_of: str = ""
    """The pass whose sequences this one takes; empty where it sampled its own."""
    in_process_failure: str = ""
    """Why vLLM ran in a process of its own; empty where it ran as planned."""
    why: str = ""
    """Why the pass failed or is unsupported."""
    fix: str = ""
    """What to do about that."""
    extension_failure: str = ""
    """Why a finished trainer pass could not score sequences that were sampled later."""


class ModelRecord(Record):
    """The model that was compared."""

    name: str
    """As it was asked for."""
    revision: str | None = None
    """Commit of a hub model."""
    path: str
    """Folder of the checkpoint on the machine that ran."""
    files: dict[str, str] | None = None
    """SHA-256 by file; None until they are known."""


class PromptsRecord(Record):
    """Where the prompts came from."""

    source: str
    """`built-in`, or the file."""
    n: int
    """How many there are."""
    sha256: str
    """Digest of the prompts, or of the recorded file."""
    token_ids_sha256: str | None = None
    """Digest of the encoded prompts; None until they are encoded, and for recorded sequences."""


class Machine(Result):
    """Where something ran."""

    cpu: str
    """Name of the processor."""
    cores: int | None = None
    """Cores that the process may use; None where unknown."""
    bf16_instructions: bool | None = None
    """Whether the processor multiplies BF16 in hardware; None where unknown."""
    gpus: tuple[str, ...] = ()
    """Names of the GPUs."""
    platform: str = ""
    """Operating system and C library."""


class Environment(Result):
    """What a log-prob depends on beside model and settings."""

    versions: dict[str, str]
    """Versions of the packages that a log-prob depends on, by package."""
    machine: Machine
    """The machine."""
    variables: dict[str, str]
    """Environment variables that can change a log-prob."""


class AuditRecord(Result):
    """What an audit of the run was asked for, so that the next one need not be told."""

    options: dict[str, JsonValue]
    """Options of the audit."""
    unsupported: dict[str, str]
    """By rollout dtype that the engine does not run, the reason."""


class Manifest(Document, Record):
    """`manifest.json` of a run folder. Commands assign its fields while the run goes on."""

    KIND: ClassVar[str] = "manifest"
    VERSION: ClassVar[int] = 3
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe compare --out {folder}"

    status: RunStatus
    """`running`, `interrupted` and `incomplete` runs go on with `--resume`; so do `failed` ones once that is fixed."""
    created: str
    """Local time at which the run began, ISO 8601."""
    config: CompareConfig
    """Settings of the run."""
    sizes: Sizes
    """Sizes with every default filled in."""
    device: Literal["cpu", "cuda"]
    """Where the engines ran."""
    model: ModelRecord
    """The model."""
    prompts: PromptsRecord
    """The prompts."""
    recorded: Recorded | None = None
    """The dump that was compared; None where the run sampled."""
    environment: Environment
    """Versions, machine, environment variables."""
    special_token_ids: tuple[int, ...] = ()
    """Special tokens of the tokenizer; empty until the prompts are encoded."""
    passes: dict[str, PassRecord] = {}
    """Every pass that was tried, by id."""
    audit: AuditRecord | None = None
    """What an audit of the run was asked for."""
    attribution: Mapping[str, JsonValue] | None = None
    """What an attribution of the run was asked for."""

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any]:
        recorded = raw.get("recorded")
        if recorded is None:
            return raw
        file = {key: value for key, value in recorded["file"].items() if key != "n_positive"}
        return {**raw, "recorded": {**recorded, "file": file}}
