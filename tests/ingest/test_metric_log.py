"""Logged metrics from what people have: lines, logs, JSON, tables, event files, and what only looks like them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.metric_log import LONGEST_LINE, Reading, Record, read_metrics
from mismatch_probe.ingest.metric_log.events import masked_crc
from tests.ingest.event_files import event, event_file, histogram, record, tensor

KL, DIFF = "rollout_corr/k3_kl", "training/rollout_probs_diff_mean"


def read(content: str | bytes, reading: Reading | None = None) -> list[Record]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_metrics(io.BytesIO(data), reading or Reading("it")))


def only(content: str | bytes) -> Record:
    (found,) = read(content)
    return found


class Drops(io.RawIOBase):
    """A pipe that hands out few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size = data, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._data[: min(self._size, len(buffer))]
        self._data = self._data[len(part) :]
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize(
    ("line", "values", "step"),
    [
        ("{'loss': 0.01, 'sampling/x_y': np.float64(0.5), 'epoch': 0.02}", {"loss": 0.01, "sampling/x_y": 0.5}, None),
        ("{'loss': '0.01', 'kl': nan, 'none': None}", {"loss": 0.01, "kl": math.nan, "none": None}, None),
        (f"step:3 - {KL}:1.5e-3 - {DIFF}:0.01 - t:np.float64(2.5)", {KL: 1.5e-3, DIFF: 0.01, "t": 2.5}, 3),
        ("12:01 INFO | Step 4 | 4.2s | Loss 0.1 | Mismatch KL 0.0012 | LR 1e-06", {"Mismatch KL": 0.0012}, 4),
        ("12:01 INFO Step 4 | Time: 4.2s | Loss: 0.1 | Mismatch KL: 0.0012", {"Mismatch KL": 0.0012}, 4),
        ("[2026-07-01] model.py:6 - step 12: {'train/tis': 0.9, 'train/step': 12}", {"train/tis": 0.9}, 12),
        ("\x1b[36m(TaskRunner pid=7)\x1b[0m step:1 - " + KL + ":0.5", {KL: 0.5}, 1),
        ("[36m(TaskRunner pid=7, ip=10.0.0.1)[0m step:1 - " + KL + ":0.5", {KL: 0.5}, 1),
        ("[rank0]: step 5 - " + KL + "=-0.5", {KL: -0.5}, 5),
        (f"| {KL} | 0.25 |", {KL: 0.25}, None),
        (f"{KL} 0.25", {KL: 0.25}, None),
        ('{"step": 3, "train": {"gen_kl_error": 0.25, "deep": {"x": 1}}}', {"train/gen_kl_error": 0.25}, 3),
        ('{"a": NaN, "b": Infinity, "c": true, "d": "text", "e": null}', {"b": math.inf, "e": None}, None),
    ],
)
def test_a_line(line: str, values: dict[str, float | None], step: float | None) -> None:
    found = only(line + "\n")
    assert found.step == step
    for name, value in values.items():
        assert found.values[name] == pytest.approx(value, nan_ok=True)


def test_what_is_left_out_of_an_object() -> None:
    assert only('{"a": NaN, "c": true, "d": "text", "l": [1]}').values.keys() == {"a"}


def test_a_heading_holds_for_the_lines_below_it() -> None:
    text = "".join(
        f"(W pid=1) ==== Step {n}/9 ====\n(W pid=1) 📊 Results:\n(W pid=1)   • Generation KL Error: 0.000{n}\n"
        for n in (1, 2)
    )
    assert [(one.step, dict(one.values)) for one in read(text)] == [
        (1, {"Generation KL Error": 0.0001}),
        (2, {"Generation KL Error": 0.0002}),
    ]


def test_lines_of_a_single_rank_are_left_out() -> None:
    assert not read("DEBUG | Micro Step 1/4 | Loss 0.2 | Mismatch KL 0.9\n")


def test_a_progress_bar_ends_a_line() -> None:
    assert [one.step for one in read(f" 3%| 1/9\rstep:1 - {KL}:0.1\rstep:2 - {KL}:0.2\n")] == [1, 2]


STEPS = {1: 0.25, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "".join(f"step:{n} - {KL}:{v}\n" for n, v in STEPS.items()),
        "".join(json.dumps({"_step": n, KL: v}) + "\n" for n, v in STEPS.items()),
        json.dumps([{"global_step": n, KL: v} for n, v in STEPS.items()], indent=1),
        json.dumps({"best": None, "log_history": [{"step": n, KL: str(v)} for n, v in STEPS.items()]}, indent=1),
        json.dumps({KL: {str(n): v for n, v in STEPS.items()}}, indent=1),
        json.dumps({"step": [*STEPS], KL: [*STEPS.values()]}, indent=1),
        f"step,{KL}\n" + "".join(f"{n},{v}\n" for n, v in STEPS.items()),
        f"step;{KL}\n" + "".join(f"{n};{v}\n" for n, v in STEPS.items()),
        f"step\t{KL}\r\n" + "".join(f"{n}\t{v}\r\n" for n, v in STEPS.items()),
        event_file((n, {KL: v}) for n, v in STEPS.items()),
    ],
)
@pytest.mark.parametrize("change", ["", "bom", "utf-16", "drops"])
def test_every_shape_says_the_same(content: str | bytes, change: str) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-16" if change == "utf-16" else "utf-8")
    if change == "bom" and isinstance(content, str):
        data = b"\xef\xbb\xbf" + data
    if change == "utf-16" and isinstance(content, str) and content[0] in "{[":
        pytest.skip("JSON is UTF-8")
    stream = io.BufferedReader(Drops(data, 7), 16) if change == "drops" else io.BytesIO(data)
    found = {one.step: one.values[KL] for one in read_metrics(stream, Reading("it")) if KL in one.values}
    assert found == STEPS


def test_a_wandb_export_has_a_run_in_each_column() -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(
        [
            ["Step", *(f"{run} - {KL}{end}" for run in ("a - b", "c") for end in ("", "__MIN", "__MAX"))],
            [1, 0.1, 0.05, 0.2, "", "", ""],
            [2, 0.3, 0.3, 0.3, "NaN", 0.4, 0.4],
        ]
    )
    first, second, third = read(text.getvalue())
    assert (first.step, first.run, dict(first.values)) == (1, "a - b", {KL: 0.1, f"{KL}__MIN": 0.05, f"{KL}__MAX": 0.2})
    assert (second.run, third.run, third.step) == ("a - b", "c", 2)
    assert math.isnan(third.values[KL] or 0.0)


def test_short_rows_are_counted() -> None:
    reading = Reading("it")
    assert [dict(one.values) for one in read(f"step,{KL},b_c\n1,0.1,2\n2,0.2\n", reading)] == [
        {KL: 0.1, "b_c": 2},
        {KL: 0.2},
    ]
    assert reading.damage == {"row-short": 1}


@pytest.mark.parametrize("value", [0.1, -0.0, math.inf, 1e-30])
@pytest.mark.parametrize("made", [tensor("d", True), tensor("d", False), tensor("f", True), tensor("f", False)])
def test_a_tensor_of_one_element_is_a_scalar(value: float, made: Any) -> None:
    (found,) = read(event_file([(1, {})]) + record(event(1, {KL: made(value)})))
    expected = value if made.kind == "d" else struct.unpack("<f", struct.pack("<f", value))[0]
    assert found.values[KL] == expected


def test_histograms_are_no_scalars() -> None:
    assert read(event_file([(1, {KL: 0.5})]) + record(event(2, {KL: histogram()}))) == [Record({KL: 0.5}, 1.0)]


def test_checksum_of_known_bytes() -> None:
    # RFC 3720, B.4: 32 bytes of zeros have the CRC-32C 0x8A9136AA.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("cut", "damage", "left"),
    [(5, "tail-cut", 2), (0, "", 3), ("flip", "record-damaged", 2), ("length", "record-damaged", 1)],
)
def test_a_damaged_event_file(cut: int | str, damage: str, left: int) -> None:
    records = [record(event(n, {KL: v})) for n, v in STEPS.items()]
    data = bytearray(b"".join(records))
    second = len(records[0])
    if isinstance(cut, int):
        data = data[: len(data) - cut]
    else:
        data[second + (20 if cut == "flip" else 3)] ^= 0x40
    reading = Reading("it")
    assert len(read(bytes(data), reading)) == left
    assert dict(reading.damage) == ({damage: 1} if damage else {})


def test_a_cut_document_says_what_its_lines_say() -> None:
    reading = Reading("it")
    whole = json.dumps([{KL: v} for v in STEPS.values()], indent=1)
    assert [one.values for one in read(whole[:-30], reading)] == [{KL: 0.25}, {KL: 0.5}]
    assert reading.damage == {"json-cut": 1}


def test_a_folder_of_runs(tmp_path: Path) -> None:
    for run in ("a", "b/c"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "events.out.tfevents.1.host").write_bytes(event_file([(1, {KL: 0.5})]))
    assert [one.run for one in read_metrics(tmp_path, Reading("it"))] == ["a", os.path.join("b", "c")]


def test_a_folder_with_a_file_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, KL: 0.5}]}))
    assert list(read_metrics(str(tmp_path), Reading("it"))) == [Record({KL: 0.5}, 1.0)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\0\0\n", "is empty"),
        (b":W&B\x01\x00", "wandb"),
        (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}", "binary"),
        (b"PK\x03\x04" + bytes(50), "binary"),
    ],
)
def test_refusals(content: bytes, said: str) -> None:
    with pytest.raises(IngestError) as raised:
        read(content)
    assert said in raised.value.what
    assert raised.value.fix


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.wandb").write_bytes(b":W&B")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(IngestError) as raised:
            list(read_metrics(path, Reading(repr(path))))
        assert raised.value.fix


def test_a_dump_with_tokens_is_told() -> None:
    reading = Reading("it")
    read(json.dumps({"token_ids": [1, 2], "x": 1}), reading)
    assert reading.has_tokens


def test_a_line_without_an_end_takes_little_memory() -> None:
    reading = Reading("it")

    class Endless(io.RawIOBase):
        left = 200 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            n = min(len(buffer), self.left)
            self.left -= n
            buffer[:n] = b"a" * n
            return n

    tracemalloc.start()
    assert not list(read_metrics(io.BufferedReader(Endless()), reading))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reading.damage == {"line-cut": 1}
    assert peak < 40 * LONGEST_LINE


PIECES: Sequence[bytes] = (
    *(b"{", b"}", b"[", b"]", b",", b":", b"'", b'"', b"\n", b"\r", b"|", b" - ", b"\0", b"\xff\xfe", b"\x1b["),
    *(b"step", b"Step 3/9", b"nan", b"1e999", b"-0.1", b"null", b"__MAX", b"np.float64(", KL.encode(), DIFF.encode()),
    *(
        b"{'" + KL.encode() + b"': 1}",
        b'{"step": 1, "' + KL.encode() + b'": 2}',
        b"9" * 400,
        b"\xc3\x28",
        b'{"a":' * 40,
    ),
    *(event_file([(1, {KL: 0.5})]), bytes(12), b"log_history", b"<script>", b"\t", b";"),
)


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=12)), max_size=20).map(b"".join))
@example(b'{"log_history": [[[{"a": 1e999}]], 3, null]}')
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b"[" * 100_000)
@example(b'{"a":' * 20_000)
def test_any_file_is_read_or_refused(data: bytes) -> None:
    try:
        found = read(data)
    except IngestError as error:
        found = []
        assert_told = error.what and error.fix
        assert assert_told
    for one in found:
        assert one.step is None or math.isfinite(one.step)
        assert all(value is None or isinstance(value, float) for value in one.values.values())


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(width=32)), min_size=1, max_size=6), st.data())
def test_any_change_to_an_event_file_is_read_or_refused(points: list[tuple[int, float]], data: st.DataObject) -> None:
    whole = event_file((step, {KL: value}) for step, value in points)
    read_back = [(one.step, one.values[KL]) for one in read(whole)]
    assert read_back == [(float(step), pytest.approx(value, nan_ok=True)) for step, value in points]
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(changed) - 1)), max_size=4)):
        if changed:
            changed[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(IngestError):
        assert len(read(bytes(changed))) <= len(points)
