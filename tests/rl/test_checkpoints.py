"""Checkpoints of an RL run: whole or not there, and loadable by any tool."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mismatch_probe.errors import DiskFull, TableError
from mismatch_probe.rl import policy as module
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.policy import Checkpoint, Policy, load_checkpoint, prune, save_checkpoint
from mismatch_probe.rl.records import checkpoints


@pytest.fixture(scope="module")
def policy(tied: Path) -> Policy:
    """After a step, so that the optimizer has moments."""
    policy = Policy(str(tied), RlConfig(trainer_dtype="float32"), torch.device("cpu"))
    policy.backward(policy.model(torch.tensor([[5, 6, 7]])).logits.double().square().mean())
    policy.step()
    return policy


def content(policy: Policy, step: int, n_history: int = 0) -> Checkpoint:
    moments, numbers = policy.state()
    history = [{name: t + i for name, t in policy.weights().items()} for i in range(n_history)]
    return Checkpoint(policy.weights(), moments, history, {"step": step, "n_history": n_history, **numbers})


@pytest.fixture
def save(policy: Policy, tied: Path, tmp_path: Path) -> Callable[..., Path]:
    return lambda step, n_history=0: save_checkpoint(tmp_path, policy.model, content(policy, step, n_history), tied)


def same(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_read_is_what_was_written(policy: Policy, save: Callable[..., Path]) -> None:
    path = save(12, n_history=2)
    assert path.name == "step-000012"
    found, expected = load_checkpoint(path), content(policy, 12, 2)
    assert same(found.weights, expected.weights)
    assert same(found.moments, expected.moments)
    assert all(same(a, b) for a, b in zip(found.history, expected.history, strict=True))
    assert found.state == expected.state
    assert not list(path.parent.glob(".*"))


def test_any_tool_can_load_it(policy: Policy, save: Callable[..., Path]) -> None:
    path = save(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert same(dict(model.state_dict()), policy.weights())
    assert AutoTokenizer.from_pretrained(path).encode("a+b")


def test_tokenizers_of_every_kind_come_along(policy: Policy, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"]
    for name in [*names, "model.safetensors", "notes.txt"]:
        (source / name).write_text(name)
    path = save_checkpoint(tmp_path / "all", policy.model, content(policy, 1), source)
    assert all((path / name).read_text() == name for name in names)
    assert not (path / "notes.txt").exists()


def test_a_step_can_be_written_again(policy: Policy, save: Callable[..., Path]) -> None:
    save(3, n_history=1)
    path = save(3)
    assert not (path / "history-0.st").exists()
    assert load_checkpoint(path).history == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Quota"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("call", range(3))
def test_a_full_disk_leaves_the_earlier_ones(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, call: int
) -> None:
    before = save(1)
    left = iter(range(10))
    write = module.save_file

    def full(tensors: Any, path: Path) -> None:
        if next(left) == call:
            path.write_bytes(b"half")
            raise error
        write(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(DiskFull, match="checkpoint step-000002 was not written"):
        save(2, n_history=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(before).state["step"] == 1


def test_another_failure_is_said(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(TableError, match="step-000002 cannot be written: Permission denied"):
        save(2)
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["masters.st", "optimizer.st", "history-0.st", "state.json"])
@pytest.mark.parametrize(
    "damage",
    [Path.unlink, _cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"[]"), lambda p: p.write_bytes(b"\xff")],
    ids=["missing", "cut", "empty", "list", "binary"],
)
def test_a_broken_one_is_said(save: Callable[..., Path], name: str, damage: Callable[[Path], Any]) -> None:
    path = save(1, n_history=1)
    damage(path / name)
    with pytest.raises(TableError, match="step-000001 cannot be read") as refused:
        load_checkpoint(path)
    assert refused.value.fix == "Delete it to resume from an earlier one."


def test_only_whole_ones_are_listed_and_the_newest_is_kept(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []
    for step in (10, 2, 300, 4):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "state.json").touch()
    (tmp_path / "step-000999").mkdir()
    (tmp_path / ".step-000998.tmp").mkdir()
    (tmp_path / ".step-000998.tmp" / "state.json").touch()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{s:06d}" for s in (2, 4, 10, 300)]
    prune(tmp_path, ["step-000004", "step-000077"])
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000004", "step-000300"]
    prune(tmp_path, [])
    prune(tmp_path, [])
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000300"]
