"""The errors a user can cause or act on, each with one sentence of what and one of how to fix.

Every `ProbeError` ends the command without a traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_LIMIT = 3
EXIT_INTERRUPTED = 130


class ProbeError(Exception):
    """A failure that the user can act on.

    Args:
        what: One sentence: what went wrong.
        fix: One sentence: what to do about it; empty when nothing can be advised.
    """

    exit_code = EXIT_ERROR

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} {self.fix}".strip()


class UsageError(ProbeError, ValueError):
    """The command line or configuration asks for something that cannot be."""

    exit_code = EXIT_USAGE


class FolderBusy(UsageError):
    """Another process is working on the folder."""


class PromptError(ProbeError, ValueError):
    """A prompt file is missing, empty, or has a line that cannot be read."""


class ModelError(ProbeError):
    """A model cannot be found, is incomplete, or cannot be fetched."""


class EngineMissing(ProbeError):
    """A package that an engine needs is not installed or does not import."""


class EngineError(ProbeError):
    """An engine process failed: it died, ran out of memory, or gave up."""


class DtypeRefused(EngineError):
    """An engine does not run this model in this dtype; other dtypes may go on."""


class TableError(ProbeError):
    """A file of a run directory is missing, corrupt, or of an unknown schema version."""


class IngestError(ProbeError, ValueError):
    """A recorded run cannot be read, or one of its rows is not what its format promises."""


class DiskFull(ProbeError):
    """Writing failed for want of space; finished passes stay on disk."""


class Interrupted(ProbeError):
    """The user stopped the run; finished passes stay on disk."""

    exit_code = EXIT_INTERRUPTED
