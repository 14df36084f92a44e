"""Recorded sequences: where they come from, what they hold and what of them was left out. `recorded.json`."""

from __future__ import annotations

from typing import ClassVar

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding


class Source(Result):
    """Where recorded sequences come from, and what of them was left out."""

    path: str
    """File or folder, as the user gave it."""
    format: str
    """Name of the format that was read, e.g. `nemo-rl`."""
    written_for: str = ""
    """Project and version that the format was read from."""
    n_files: int = 1
    """Files that were read."""
    sha256: str
    """Digest of the file's bytes; of several files, of their digests in the order of their names."""
    keys: tuple[str, ...] = ()
    """Keys of the generic format that the rows have."""
    n_rows: int
    """Rows of the dump, blank lines not counted."""
    n_left_out: int = 0
    """Rows that break a rule of the format and are not in the run; `findings` says which rule."""
    n_empty_responses: int
    """Rows without a response token; they hold nothing to compare and are not in the run."""
    n_sequences: int
    """Rows that are in the run, S."""
    n_prompts: int = 0
    """Distinct prompts of these."""
    n_prompt_tokens: int = 0
    """Prompt tokens in the run."""
    n_tokens: int
    """Response tokens in the run, N, masked ones included."""
    n_masked_tokens: int
    """Response tokens whose `loss_mask` is 0."""
    n_masked_sequences: int
    """Sequences of which every token is masked."""
    n_empty_prompts: int
    """Sequences without a prompt token; no engine can score their first token."""
    longest_prompt: int = 0
    """Tokens of the longest prompt."""
    longest_response: int = 0
    """Tokens of the longest response."""
    longest_sequence: int = 0
    """Most tokens of a prompt and its response together."""
    largest_id: int = 0
    """Largest token id."""
    ignored_columns: tuple[str, ...]
    """Names of columns that were not read, sorted, long ones cut."""
    findings: tuple[Finding, ...] = ()
    """What cannot be log-probs or does not line up, the most important first."""


class Recorded(Result):
    """The dump of a run `--from` one."""

    rollout: bool
    """Whether it has log-probs of the rollout."""
    trainer: bool
    """Whether it has log-probs of the trainer."""
    file: Source
    """The dump."""


class Dump(Document):
    """`recorded.json` of the folder that `ingest` writes, beside `recorded.parquet`."""

    KIND: ClassVar[str] = "dump"
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "mismatch-probe ingest DUMP --out {folder}"

    created: str
    """Local time at which it was read, ISO 8601."""
    recorded: Recorded
    """What it holds."""
