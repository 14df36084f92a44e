"""What of one side's log-probs cannot be one: by value, and where it stands. Shape legend: `n` tokens that count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.blocks import Block, Ints, Tally
from mismatch_probe.metrics.chunks import LARGEST, SMALLEST, Side
from mismatch_probe.results.finding import Finding

STANDS = ("whole", "first", "last", "runs", "scattered")
"""Where flagged tokens stand in the tokens of a response that count: all of them, from the first one on, up to the last
one, several in a row elsewhere, alone."""
# Values that are told by themselves, the first ones that come; a broken side has another one at every token.
_NAMED_VALUES = 8
# A log-softmax in 16 bits leaves values above 0 up to this one.
LARGEST_16_BIT = 0.25
# Zeros at one end: in this share of the rows, of so many at least, and at no more than this share of other tokens.
_NEARLY_ALL, _ENOUGH_ROWS, _HARDLY_ANY = 0.9, 8, 0.01


class ValueTally(Tally):
    """Tokens of one value, and where in their response they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.stands: Counter[str] = Counter()


class Values:
    """Flagged tokens of one side by their value.

    Args:
        rest: Name of what has a value beyond the first few.
    """

    def __init__(self, rest: str) -> None:
        self._rest = rest
        self._tallies: dict[str, ValueTally] = {}

    def add(self, block: Block, values: NDArray[np.float64], tokens: Ints) -> None:
        """Takes in tokens of a block `[k]`, increasing, whose values stand in `values` `[n]`."""
        if not len(tokens):
            return
        found, first, code = np.unique(values[tokens] + 0.0, return_index=True, return_inverse=True)  # −0 is 0
        start, length, stand = _runs(block, tokens, code)
        for index in np.argsort(first).tolist():
            tally = self._tally(float(found[index]))
            tally.add(block, tokens[code == index])
            of = code[start] == index
            counts = np.bincount(stand[of], weights=length[of], minlength=len(STANDS))
            tally.stands.update({name: int(n) for name, n in zip(STANDS, counts, strict=True) if n})

    def _tally(self, value: float) -> ValueTally:
        name = f"{value:.9g}"
        always = value in (0, 1) or not np.isfinite(value)
        if not always and name not in self._tallies and len(self._tallies) >= _NAMED_VALUES:
            name = self._rest
        return self._tallies.setdefault(name, ValueTally())

    def findings(self, code: str, side: Side, n: int, n_rows: int, n_zeros: int = 0) -> Iterator[Finding]:
        """A finding for each value.

        Args:
            code: Of the findings.
            side: Whose values.
            n: Tokens that the side has.
            n_rows: Rows with such tokens.
            n_zeros: Zeros of the side that stay log-probs.
        """
        for value, tally in self._tallies.items():
            stands = {name: float(count) for name, count in tally.stands.items()}
            values = {"side": side, "value": value, **counts(tally, n, n_rows), "stands": stands}
            kept = {"n_kept": n_zeros} if value == "0" else {}
            yield Finding(code=code, severity="warn", where=side, values={**values, **kept})


def counts(tally: Tally, n: int, n_rows: int) -> dict[str, int | float | tuple[str, ...]]:
    """What every finding says of its tokens, among `n` in `n_rows` rows."""
    return {
        "n": tally.n,
        "share": tally.n / n if n else 0.0,
        "n_rows": tally.n_rows,
        "share_of_rows": tally.n_rows / n_rows if n_rows else 0.0,
        "places": tuple(tally.places),
    }


def _runs(block: Block, tokens: Ints, code: Ints) -> tuple[Ints, Ints, Ints]:
    """First token among `tokens`, length, and index in `STANDS` of the runs of equal codes."""
    sequence, position = block.sequence[tokens], block.position[tokens]
    breaks = (np.diff(sequence) != 0) | (np.diff(position) != 1) | (np.diff(code) != 0)
    start = np.flatnonzero(np.append(True, breaks))
    length = np.diff(start, append=len(tokens))
    rows = sequence[start]
    first, last = block.ends
    begins, ends = position[start] == first[rows], position[start + length - 1] == last[rows]
    stand = np.select([begins & ends, begins, ends, length > 1], [0, 1, 2, 3], 4)
    return start, length, stand


class Positives:
    """Log-probs above 0 of one side: rounding of float32, of 16 bits, or no log-probs."""

    def __init__(self) -> None:
        self._excluded, self._n_rounding = Tally(), 0
        self._n_16_bit = 0
        self._largest = -np.inf

    def add(self, block: Block, values: NDArray[np.float64]) -> None:
        """Takes in the values `[n]` of a block; 1 and infinity are placeholders."""
        tokens = np.flatnonzero(values > 0)
        tokens = tokens[(values[tokens] != 1) & np.isfinite(values[tokens])]
        if not len(tokens):
            return
        above = values[tokens]
        self._largest = max(self._largest, float(above.max()))
        self._n_rounding += int(np.count_nonzero(above <= LARGEST))
        self._n_16_bit += int(np.count_nonzero((above > LARGEST) & (above <= LARGEST_16_BIT)))
        self._excluded.add(block, tokens[above > LARGEST])

    def findings(self, side: Side, n: int, n_rows: int) -> Iterator[Finding]:
        """One finding where a value is above what rounding of float32 leaves."""
        if self._excluded.n:
            values = {
                "side": side,
                **counts(self._excluded, n, n_rows),
                "largest": self._largest,
                "n_16_bit": self._n_16_bit,
                "n_impossible": self._excluded.n - self._n_16_bit,
                "n_rounding": self._n_rounding,
            }
            yield Finding(code="positive-logprobs", severity="warn", where=side, values=values)


class Zeros:
    """Zeros of one side at the first or the last token of nearly every row and hardly elsewhere.

    They are told where the other side is not recorded; where it is, it says which zeros are log-probs.
    """

    def __init__(self) -> None:
        self._n_rows = self._n = self._n_zeros = 0
        self._ends = {"first": Tally(), "last": Tally()}

    def add(self, block: Block, values: NDArray[np.float64], alone: NDArray[np.bool_]) -> None:
        """Takes in the values `[n]` of a block that have no value of the other side, as `alone` `[n]` says."""
        if not alone.any():
            return
        self._n += int(np.count_nonzero(alone))
        self._n_rows += len(np.unique(block.sequence[alone]))
        zeros = np.flatnonzero((values == 0) & alone)
        self._n_zeros += len(zeros)
        for tally, ends in zip(self._ends.values(), block.ends, strict=True):
            tally.add(block, zeros[block.position[zeros] == ends[block.sequence[zeros]]])

    def findings(self, side: Side) -> Iterator[Finding]:
        """One finding for the first tokens, one for the last ones."""
        for end, tally in self._ends.items():
            elsewhere = self._n_zeros - tally.n
            many = self._n_rows >= _ENOUGH_ROWS and tally.n >= _NEARLY_ALL * self._n_rows
            if many and elsewhere <= _HARDLY_ANY * (self._n - tally.n):
                values = {"side": side, "end": end, **counts(tally, self._n, self._n_rows), "n_elsewhere": elsewhere}
                yield Finding(code="zeros-at-one-end", severity="note", where=side, values=values)


def is_placeholder(values: NDArray[np.float64], blamed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[n]` which of the values to blame stand for a log-prob that is not there; other positive ones do not."""
    return np.asarray(blamed & ~((values > LARGEST) & (values != 1) & np.isfinite(values)))


BELOW = f"< {SMALLEST:g}"
"""What is written for values below the least log-prob, beyond the first few."""
