"""The manifest of a run: what was asked for, with what, and what has become of every pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import ConfigDict, JsonValue

from mismatch_probe.config import CompareConfig, Sizes
from mismatch_probe.results.base import Document, Result

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


class RecordedSides(Result):
    """Whose log-probs a recorded file brings."""

    rollout: bool
    """Whether it has log-probs of the rollout."""
    trainer: bool
    """Whether it has log-probs of the trainer."""


class Source(Result):
    """Where a recorded run comes from and what of it was left out."""

    path: str
    """As the user gave it."""
    format: str
    """`jsonl` or `parquet`."""
    sha256: str
    """Digest of the whole file's bytes."""
    n_rows: int
    """Rows of the file, blank lines not counted."""
    n_empty_responses: int
    """Rows without a response token; they hold nothing to compare and are not in the run."""
    n_sequences: int
    """Rows that are in the run, S."""
    n_tokens: int
    """Response tokens in the run, N, masked ones included."""
    n_masked_tokens: int
    """Response tokens whose `loss_mask` is 0."""
    n_masked_sequences: int
    """Sequences of which every token is masked."""
    n_empty_prompts: int
    """Sequences without a prompt token; no engine can score their first token."""
    n_positive: dict[str, int]
    """By side, tokens that are not masked and whose log-prob is finite and above 1e-4, which no probability has. They
    stay in the tables and are left out of every metric."""
    ignored_columns: tuple[str, ...]
    """Names of columns that were not read, sorted, long ones cut."""


class Recorded(RecordedSides):
    """The recorded file of a run `--from` one."""

    file: Source
    """The file."""


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
    VERSION: ClassVar[int] = 2
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
    """The file that was compared; None where the run sampled."""
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
