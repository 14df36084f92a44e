"""Pickles and torch files: what is in them comes back exactly, and no code of theirs runs, whatever the bytes are."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.pickles.classes import fields_of
from mismatch_probe.ingest.pickles.machine import Builders, Machine, PickleError, StandIn
from mismatch_probe.ingest.pickles.rebuild import load_bytes, load_file, reading
from mismatch_probe.ingest.read import ReadOptions, read_dump
from mismatch_probe.results.dump import Recorded

TRUSTED = ReadOptions(trust_pickle=True)
SAMPLE: dict[str, Any] = {
    "index": 0,
    "tokens": [1, 300, 70000, 4],
    "response_length": 2,
    "rollout_log_probs": [-0.5, -1.0],
    "loss_mask": [1, 1],
    "status": "completed",
    "reward": 1.0,
    "weight_versions": ["3"],
}
GOOD = {"rollout_id": 1, "samples": [SAMPLE]}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(plain, st.integers(0, 5))
def test_plain_values_come_back_from_every_protocol(value: Any, protocol: int) -> None:
    assert load_bytes(pickle.dumps(value, protocol)) == value
    assert load_bytes(pickletools.optimize(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_long_lists(count: int) -> None:
    value = [[index * 37 % 100_003, -index, index / 7, index % 2] for index in range(count)]
    flat = [one for each in value for one in each]
    for protocol in range(6):
        assert load_bytes(pickle.dumps(flat, protocol)) == flat


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", ">i4", "i1", "u2", "i8", "?", "U3", "S2"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy(dtype: str, protocol: int) -> None:
    for array in (
        np.arange(6).astype(dtype).reshape(2, 3),
        np.asfortranarray(np.arange(6).astype(dtype).reshape(2, 3)),
    ):
        found = load_bytes(pickle.dumps([array, array], protocol))
        for one in found:
            np.testing.assert_array_equal(one, array)
            assert one.dtype == array.dtype
    assert load_bytes(pickle.dumps(np.array(["a", None], object), protocol)) == ["a", None]
    assert load_bytes(pickle.dumps(np.float32(0.1), protocol)) == float(np.float32(0.1))


@pytest.mark.parametrize(
    "kind", ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "uint16"]
)
@pytest.mark.parametrize(
    "write", [saved, pickle.dumps, lambda value: saved(value, _use_new_zipfile_serialization=False)]
)
def test_tensors(kind: str, write: Any) -> None:
    if kind == "uint16" and write is not saved:
        pytest.skip("torch does not write it this way")
    base = torch.arange(24).to(getattr(torch, kind)).reshape(4, 6)
    views = [base, base.t(), base[1:3, ::2], base[0], base[2, 3], base[:0], base[:, :1].expand(4, 5)]
    for view, found in zip(views, load_bytes(write(views)), strict=True):
        np.testing.assert_array_equal(found, view.numpy())
        assert found.dtype == view.numpy().dtype


def test_bfloat16_becomes_float32_exactly() -> None:
    tensor = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    np.testing.assert_array_equal(load_bytes(saved(tensor)), tensor.float().numpy())
    assert load_bytes(saved(tensor)).dtype == np.float32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_become_lists() -> None:
    parts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    for layout in (torch.jagged, torch.strided):
        found = load_bytes(saved(torch.nested.as_nested_tensor(parts, layout=layout)))
        assert [one.tolist() for one in found] == [[1, 2, 3], [4]]


class Odd:
    def __init__(self) -> None:
        self.tokens = [1, 2]


class Slotted:
    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = [1, 2]


class OddDict(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("made", [Odd(), Slotted(), OddDict(tokens=[1, 2]), collections.OrderedDict(tokens=[1, 2])])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_of_unknown_classes_show_their_state(made: Any, protocol: int) -> None:
    assert fields_of(load_bytes(pickle.dumps(made, protocol))) == {"tokens": [1, 2]}


# Code ----------------------------------------------------------------------------------------------------------------


class Runs:
    """Writes a file when it is unpickled by Python."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


def exploits(target: Path) -> list[bytes]:
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w').close()"
    calls = [Runs(os.system, command), Runs(eval, code), Runs(exec, code), Runs(subprocess.getoutput, command)]
    held = [[one] for one in calls] + [{"rollout_id": 1, "samples": one} for one in calls]
    found = [pickle.dumps(one, protocol) for one in [*calls, *held] for protocol in range(6)]
    found += [saved(one) for one in held]
    text = command.encode()
    found.append(b"(S'" + text + b"'\nios\nsystem\n.")
    found.append(b"(cos\nsystem\nS'" + text + b"'\no.")
    found.append(b"cbuiltins\ngetattr\n(cos\n__name__\nS'system'\ntR.")
    # A builder that is known must not pass on what it is given.
    found.append(b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(S'" + text + b"'\ntNtR.")
    found.append(b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\nNNtR(S'" + text + b"'\ntR.")
    found.append(b"c__builtin__\nset\n(cos\nsystem\n(S'" + text + b"'\ntRtR.")
    return found


def test_no_code_runs(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for data in exploits(target):
        with pytest.raises(IngestError):
            read(data, tmp_path)
        assert not target.exists()
    pickle.loads(pickle.dumps(Runs(eval, f"open({str(target)!r}, 'w').close()")))
    assert target.exists(), "the exploit works where Python unpickles"


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        value = load_bytes(b"chostile_module\nthing\n(I1\ntR.")
    finally:
        sys.path.remove(str(tmp_path))
    assert type(value) is StandIn
    assert value.made_by.full == "hostile_module.thing"
    assert "hostile_module" not in sys.modules


# What claims more than it has ----------------------------------------------------------------------------------------


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"x": 1}))
        archive.writestr("a/data/0", b"\0" * (1 << 24))
    return buffer.getvalue()


def claiming() -> bytes:
    """The directory of the zip claims a member of 4 GB."""
    data = bytearray(saved({"x": torch.zeros(64)}))
    at = data.rfind(b"PK\x01\x02")
    for offset in (20, 24):
        data[at + offset : at + offset + 4] = struct.pack("<I", 0xFFFFFFF0)
    return bytes(data)


def overlapping() -> bytes:
    """Two hundred entries of the directory are one and the same member."""
    data = saved({"x": torch.zeros(4096)})
    end = data.rfind(b"PK\x05\x06")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[start : start + size]
    at = directory.find(b"data/0") - 46 - directory[: directory.find(b"data/0")][::-1].find(b"/")
    entry_at = directory.rfind(b"PK\x01\x02", 0, directory.find(b"data/0"))
    length = 46 + sum(struct.unpack("<HHH", directory[entry_at + 28 : entry_at + 34]))
    entry = directory[entry_at : entry_at + length]
    assert at
    more = b"".join(entry.replace(b"data/0", b"data/%c" % (48 + index)) for index in range(1, 60))
    tail = bytearray(data[end:])
    entries = struct.unpack("<H", tail[8:10])[0] + 59
    tail[8:16] = struct.pack("<HHI", entries, entries, size + len(more))
    return data[:start] + directory + more + bytes(tail)


HOSTILE = {
    "a zip bomb": bomb(),
    "a zip that claims": claiming(),
    "members that overlap": overlapping(),
    "an absurd memo": b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytes that are not there": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "text that is not there": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a frame that is not there": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "a deep list": b"\x80\x04" + b"](" * 200_000 + b"e" * 200_000 + b".",
    "a deep tuple as a key": b"\x80\x04}N" + b"2\x86" * 64 + b"Ns.",
    "an array that is absurd": pickle.dumps(np.zeros(3), 4).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
    "a legacy array that is absurd": pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer elsewhere": b"\x80\x05\x97.",
    "nothing": b"",
    "one byte": b"\x80",
    "HTML": b"<html><script>alert(1)</script>",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_hostile_files(tmp_path: Path, name: str, suffix: str) -> None:
    with pytest.raises(IngestError) as caught:
        read(HOSTILE[name], tmp_path, suffix)
    assert (caught.value.what + caught.value.fix).isprintable()


@pytest.mark.parametrize(
    ("data", "said"),
    [(bomb(), "with compressed members"), (claiming(), "claims more bytes"), (overlapping(), "claims more bytes")],
)
def test_zips_that_claim_more_than_they_have(data: bytes, said: str) -> None:
    with pytest.raises(PickleError, match=said), reading():
        load_bytes(data)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((1 << 40,), (0,), 0), ((8,), (1,), 1), ((2, 2), (8, 1), 0), ((-1,), (1,), 0), ((4,), (-1,), 3)],
)
def test_a_tensor_stays_inside_its_storage(shape: Any, strides: Any, offset: int) -> None:
    good = saved({"x": torch.zeros(8)})
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        names = {one.filename: archive.read(one) for one in archive.infolist()}
    (key,) = [name for name in names if name.endswith("data.pkl")]

    class Made:
        def __reduce__(self) -> Any:
            empty: Any = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (Place(), offset, shape, strides, False, empty)

    class Place:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 8) if type(value) is Place else None

    buffer = io.BytesIO()
    Writer(buffer, 2).dump({"x": Made()})
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, buffer.getvalue() if name == key else data)
    with pytest.raises(PickleError), reading():
        load_bytes(written.getvalue())


def test_memory_of_a_hostile_memo_is_small() -> None:
    machine = Machine(b"\x80\x04Nr\xff\xff\xff\xff.", Builders({}))
    assert machine.load() is None
    assert len(machine._memo) == 1


# Fuzz ----------------------------------------------------------------------------------------------------------------

SLIME = {
    "tokens": [torch.arange(4)],
    "response_lengths": [2],
    "log_probs": [torch.zeros(2)],
    "rollout_log_probs": [torch.ones(2, dtype=torch.bfloat16)],
}
SKYRL = {
    "sequences": np.arange(8).reshape(2, 4),
    "attention_mask": np.ones((2, 4)),
    "loss_mask": np.ones((2, 2)),
    "response_mask": np.ones((2, 2)),
    "action_log_probs": np.full((2, 2), -1.0),
}
TRL = {
    "prompt_ids": torch.ones(2, 2).long(),
    "prompt_mask": torch.ones(2, 2),
    "completion_ids": torch.ones(2, 2).long(),
    "completion_mask": torch.ones(2, 2),
    "sampling_per_token_logps": -torch.ones(2, 2),
}
PIPELINE = {
    "input_ids": torch.arange(6)[None],
    "labels": torch.arange(6)[None],
    "old_logprobs": -torch.ones(1, 6),
    "seq_boundaries": torch.tensor([0, 3, 6]),
    "model_version": 3,
}
TINKER = {
    "model_input": [1, 2, 3],
    "loss_fn_inputs": {"target_tokens": [2, 3, 4], "logprobs": [0.0, -1.0, -1.0], "mask": [0, 1, 1]},
}
SEEDS = [
    saved(GOOD),
    saved({"rollout_id": 1, "rank": 0, "rollout_data": SLIME}),
    pickle.dumps(GOOD, 2),
    pickle.dumps(GOOD, 4),
    pickle.dumps(SKYRL, 4),
    pickle.dumps(TRL),
    saved(PIPELINE),
    pickle.dumps(TINKER, 4),
]
WRONG = [None, 1, -1, 2**70, "x", b"x", [], [[]], {}, [[1], [2, 3]], [None], [True], {"x": 1}, 1e400, float("nan")]
WRONG += [np.zeros((2, 2, 2)), np.array(["a"]), np.zeros(0)]


def read(data: bytes, folder: Path, suffix: str = ".pt") -> Recorded:
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    return read_dump(path, folder / "out.parquet", TRUSTED)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at : at + draw(st.integers(1, 40))]
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case _:
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_seeds_are_read(tmp_path: Path, suffix: str) -> None:
    read_well = [index for index, seed in enumerate(SEEDS) if suffix == ".pt" or not seed.startswith(b"PK")]
    assert len(read_well) > 4
    for index in read_well:
        if suffix == ".pkl" and index in (2, 3):  # slime writes torch files alone
            continue
        assert read(SEEDS[index], tmp_path, suffix).file.n_tokens > 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated() | st.binary(max_size=200), suffix=st.sampled_from([".pt", ".pkl"]))
def test_mutated_files_are_read_or_refused(tmp_path: Path, data: bytes, suffix: str) -> None:
    with contextlib.suppress(IngestError):
        assert isinstance(read(data, tmp_path, suffix), Recorded)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.sampled_from(SEEDS),
    swaps=st.dictionaries(st.integers(0, 7), st.sampled_from(WRONG), min_size=1, max_size=3),
    within=st.booleans(),
)
def test_values_of_other_kinds_are_read_or_refused(
    tmp_path: Path, keys: bytes, swaps: dict[int, Any], within: bool
) -> None:
    path = tmp_path / "seed"
    path.write_bytes(keys)
    fields = dict(fields_of(load_file(path)) or {})
    names = list(fields)
    fields |= {names[place % len(names)]: value for place, value in swaps.items()}
    if within and "samples" in names:
        inner = list(SAMPLE)
        fields["samples"] = [SAMPLE | {inner[place % len(inner)]: value for place, value in swaps.items()}]
    with contextlib.suppress(IngestError):
        assert isinstance(read(pickle.dumps(fields), tmp_path), Recorded)
