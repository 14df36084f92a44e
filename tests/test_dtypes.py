"""The table of formats, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.dtypes import DTYPE_INFOS, SHORT_DTYPES, dtype_label
from mismatch_probe.metrics.floats import FORMATS


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_formats_are_numpys(name: str) -> None:
    info, known = DTYPE_INFOS[name], np.finfo(name)
    assert (info.bits, info.bytes, info.unit_roundoff) == (known.bits, known.bits // 8, known.eps / 2)
    assert (2.0**info.lowest, info.highest) == (known.smallest_normal, known.maxexp - 1)
    assert name == "float64" or FORMATS[name].largest == float(known.max)


def test_every_short_name_is_of_a_dtype_and_what_is_none_keeps_its_name() -> None:
    assert {SHORT_DTYPES[info.short] for info in DTYPE_INFOS.values() if info.name != "float64"} == set(FORMATS)
    assert (dtype_label("bfloat16"), dtype_label("recorded")) == ("BF16", "recorded")
