"""What a long step tells its caller. The base class is silent; the command line draws bars."""

from __future__ import annotations


class Progress:
    """Told about every pass; all methods do nothing here."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, pass_id: str, text: str) -> None:
        """A pass begins; `text` says which, for people."""

    def total(self, pass_id: str, tokens: int) -> None:
        """The pass's work is known: this many tokens."""

    def advance(self, pass_id: str, tokens: int) -> None:
        """So many more are done."""

    def end(self, pass_id: str, text: str) -> None:
        """The pass has ended; `text` says how, in a word or a sentence."""
