"""The floating-point formats of the instrument, in one table: how they are called, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch_probe.types import DTYPES, Dtype


@dataclass(frozen=True)
class DtypeInfo:
    """A binary floating-point format (IEEE 754).

    Attributes:
        name: As tables and torch call it, e.g. `"bfloat16"`.
        short: On the command line, e.g. `"bf16"`.
        label: In sentences and figures, e.g. `"BF16"`.
        bits: In memory.
        digits: Significant bits, the hidden one included.
        lowest, highest: Exponents of the smallest and of the largest normal numbers.
    """

    name: str
    short: str
    label: str
    bits: int
    digits: int
    lowest: int
    highest: int

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.bits // 8

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to nearest: 2^−`digits`."""
        return float(2.0**-self.digits)


DTYPE_INFOS = {
    info.name: info
    for info in (
        DtypeInfo("float16", "fp16", "FP16", 16, 11, -14, 15),
        DtypeInfo("bfloat16", "bf16", "BF16", 16, 8, -126, 127),
        DtypeInfo("float32", "fp32", "FP32", 32, 24, -126, 127),
        DtypeInfo("float64", "fp64", "FP64", 64, 53, -1022, 1023),
    )
}
"""By name, the narrowest first."""
SHORT_DTYPES: dict[str, Dtype] = {DTYPE_INFOS[name].short: name for name in DTYPES} | {"half": "float16"}
"""Names on the command line of the dtypes that an engine runs in."""


def dtype_label(name: str) -> str:
    """`FP16` of `float16`; what is no format of the table, e.g. `recorded`, stays as it is."""
    return DTYPE_INFOS[name].label if name in DTYPE_INFOS else name
