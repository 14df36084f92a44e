"""Files of settings: what `--save-config` writes, `--config` reads again."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mismatch_probe.cli.main import cli
from mismatch_probe.cli.options import SettingsCommand
from mismatch_probe.config.settings import Setting, Settings, settings_of
from mismatch_probe.config.toml import read_settings, toml_of
from mismatch_probe.errors import UsageError
from tests.conftest import Outcome
from tools.pages import commands_of

KINDS: dict[str, type[Settings]] = {
    " ".join(words): context.command.settings
    for words, context in commands_of(cli)
    if isinstance(context.command, SettingsCommand)
    and any("--config" in parameter.opts for parameter in context.command.params)
}
TEXT = st.text(string.ascii_letters + "é/\\\"'#= \n\x7f\u2028", max_size=8)
WORD = st.text(string.ascii_letters + "é/\\\"'#=\x7f", min_size=1, max_size=8)
# Of settings whose text has a form.
FORMS: dict[str, st.SearchStrategy[Any]] = {
    "exact_kl": st.sampled_from(["all", 0, 512]),
    "pair": st.sampled_from(["bf16", "fp16/fp32"]),
    "pairs": st.lists(st.sampled_from(["bf16", "fp16/fp32", "float32"]), unique=True, max_size=2),
    "engine_args": st.dictionaries(
        st.sampled_from(["block_size", "x"]),
        st.booleans() | st.integers(-9, 9) | TEXT | st.lists(st.integers(), max_size=2) | st.just({"a b": [1.5]}),
    ),
    "keep": st.just((0.25, 0.75)),
}


def test_every_command_with_files_is_tried() -> None:
    assert {"compare", "audit", "attribute", "report", "preflight", "rl run", "rl gradient"} <= KINDS.keys()


def value_of(one: Setting) -> st.SearchStrategy[Any]:
    """Values that a setting could take; some are not allowed."""
    if one.name in FORMS:
        return FORMS[one.name]
    match one.kind:
        case "flag":
            single: st.SearchStrategy[Any] = st.booleans()
        case "choice":
            single = st.sampled_from(one.choices)
        case "integer":
            single = st.integers(1, 64)
        case "number":
            single = st.floats(1e-9, 0.99)
        case _ if one.known is not None:
            single = st.sampled_from(sorted(one.known()))
        case _:
            single = WORD if one.several else TEXT
    return st.lists(single, unique=True, max_size=3) if one.several else single


@pytest.mark.parametrize("command", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_saved_comes_back_and_unset_stays_unset(command: str, data: st.DataObject, tmp_path: Path) -> None:
    kind = KINDS[command]
    known = settings_of(kind)
    names = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=4))
    try:
        asked = kind.of({name: data.draw(value_of(known[name]), label=name) for name in names})
    except UsageError:
        assume(False)
    file = tmp_path / "settings.toml"
    file.write_text(toml_of(asked), encoding="utf-8")
    back = read_settings(file, kind)
    assert back.keys() == {name for name in names if known[name].file and getattr(asked, name) is not None}
    again = kind.of(back)
    for name in known:
        assert getattr(again, name) == getattr(asked if known[name].file else kind(), name)


@pytest.mark.parametrize("command", KINDS)
def test_defaults_are_comments_with_their_values(command: str, tmp_path: Path) -> None:
    kind, file = KINDS[command], tmp_path / "settings.toml"
    file.write_text(toml_of(kind()), encoding="utf-8")
    assert read_settings(file, kind) == {}
    lines = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and " = " in line]
    uncommented = tomllib.loads("\n".join(line for line in lines if line.partition(" = ")[0] in settings_of(kind)))
    assert kind.of(uncommented) == kind()


@pytest.mark.parametrize("command", [name for name, kind in KINDS.items() if "trust_remote_code" in settings_of(kind)])
def test_a_file_cannot_let_code_run(command: str, tmp_path: Path) -> None:
    kind, file = KINDS[command], tmp_path / "settings.toml"
    assert "trust_remote_code" not in toml_of(kind.of({"trust_remote_code": True}))
    file.write_text("trust_remote_code = true\n")
    with pytest.raises(UsageError, match="trust_remote_code, which only the command line can"):
        read_settings(file, kind)


def test_at_the_command_line(command: Callable[..., Outcome], tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    asked = ("--steps", "7", "--rollout-dtype", "fp16", "--no-check-sync")
    said = command("rl", "run", "--check", *asked, "--save-config", first)
    again = command("rl", "run", "--check", "--config", first, "--save-config", second)
    assert (said.code, again.code) == (0, 0)
    assert said.out == again.out
    assert first.read_text() == second.read_text()
    (tmp_path / "code.toml").write_text("trust_remote_code = true\n")
    refused = command("compare", "--plan", "--config", tmp_path / "code.toml")
    assert refused.code == 2
    assert "--trust-remote-code" in refused.err
