"""README.md and docs/: commands parse, links lead somewhere, and what is named exists."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from mismatch_probe.cli.main import cli
from mismatch_probe.cli.options import SettingsCommand
from tools.pages import commands_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"(?:^\s*(?:\$ |- run: )?|`)mismatch-probe (?=\S)(?P<arguments>[^`\n]*)", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_NAMED = re.compile(r"(?<![\w/.-])(?:benchmarks|tests|data|notebooks|validation|mismatch_probe)/[\w./-]*[\w/]")
_RETIRED = re.compile(
    r"\b(?:knobs?|not judged|mend(?:s|ed|ing)?|(?:sampling )?laws?|nulls?|refus(?:es?|ed|als?)|anchors?)\b", re.I
)
_OPERATORS = (">", "|", "&&", ";")


def shown_commands(text: str) -> list[str]:
    return [found["arguments"] for found in _COMMAND.finditer(text)]


def parse(line: str) -> None:
    """Parses a command line as click does, and runs nothing."""
    words = shlex.split(line, comments=True)
    ends = [words.index(operator) for operator in _OPERATORS if operator in words]
    command, arguments, context = cli, words[: min(ends, default=None)], None
    while isinstance(command, click.Group) and arguments and arguments[0] not in ("-h", "--help"):
        parent = click.Context(command, parent=context, **command.context_settings)
        _, inner, arguments = command.resolve_command(parent, arguments)
        assert inner is not None
        command, context = inner, parent
    if not isinstance(command, click.Group):
        with command.make_context(command.name, arguments, parent=context) as made:
            if isinstance(command, SettingsCommand):
                given = {name: made.params[name] for name in command.settings.model_fields}
                command.settings.of({name: value for name, value in given.items() if value not in (None, ())})


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("names", [names for names, _ in commands_of(cli)], ids=" ".join)
def test_every_command_shows_an_example_that_parses(names: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in names:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name) or command
    examples = shown_commands(command.help or "")
    assert any(example.startswith(" ".join(names)) for example in examples), examples
    for example in examples:
        parse(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_parse(page: Path) -> None:
    for line in shown_commands(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_of_a_page_exist(page: Path) -> None:
    for target in (found["target"] for found in _LINK.finditer(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert [name for name in _NAMED.findall(page.read_text(encoding="utf-8")) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_uses_no_retired_word(page: Path) -> None:
    assert _RETIRED.findall(page.read_text(encoding="utf-8")) == []


def test_every_image_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [path.name for path in (ROOT / "docs/images").iterdir() if f"images/{path.name}" not in text] == []


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE)) <= targets


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
