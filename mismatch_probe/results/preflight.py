"""The document of `preflight`: what a checkpoint says of itself, and what of it will fail or surprise."""

from __future__ import annotations

from typing import ClassVar

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding


class CheckpointFacts(Result):
    """What headers and configuration say."""

    model_type: str
    """Model type of `config.json`; of its language model where it has several."""
    architecture: str
    """First architecture of `config.json`, empty where there is none."""
    format: str
    """Of the weights: `safetensors`, `bin` or `none`."""
    files: int
    """Files of weights."""
    bytes: int
    """Their size."""
    tensors: int
    """Tensors by the headers; 0 where the format has none that can be read."""
    parameters: int
    """Weights."""
    dtypes: dict[str, int]
    """Weights by dtype as safetensors names it, e.g. `{"BF16": 134515008}`."""
    context: int | None
    """Longest sequence that the model was made for, in tokens."""
    vocabulary: int | None
    """Rows of the embedding by `config.json`."""


class CheckRun(Result):
    """A check, and whether it ran."""

    name: str
    """Its name."""
    skipped_for: tuple[str, ...] = ()
    """What it needs and is not known; empty where it ran."""


class Preflight(Document):
    """The document of a preflight."""

    KIND: ClassVar[str] = "preflight"
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "mismatch-probe preflight MODEL --json"

    model: str
    """What the user called the model."""
    revision: str | None
    """Commit of a hub snapshot."""
    checkpoint: CheckpointFacts
    """What headers and configuration say."""
    checks: tuple[CheckRun, ...]
    """Every check."""
    findings: tuple[Finding, ...]
    """What was found, what fails first."""
    seconds: float
    """How long it took, in seconds."""

    def of(self, *severities: str) -> list[Finding]:
        """The findings of these severities."""
        return [finding for finding in self.findings if finding.severity in severities]
