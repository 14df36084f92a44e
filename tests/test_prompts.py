"""The built-in prompt set holds what it promises, and every way to get a prompt file wrong gets a sentence."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mismatch_probe.errors import ProbeError, PromptError
from mismatch_probe.files import data_path
from mismatch_probe.prompts import load_prompts

CATEGORIES = ("mathematics", "reasoning", "code", "chat", "multilingual")

COMPUTED_ANSWERS = {
    "math-01": 180 // 3,
    "math-02": next(x for x in range(100) if 3 * x + 5 == 20),
    "math-03": sum(range(1, 10, 2)),
    "math-04": 80 * 15 // 100,
    "math-05": 7 * 4,
    "math-06": 4 * 60,
    "math-07": 12 - 5,
    "math-08": math.gcd(18, 24),
    "math-09": 180,
    "math-10": 14 * 6,
    "math-11": [1, 1, 2, 3, 5, 8, 13, 21, 34, 34 + 21][9],
    "math-12": 9 // 3 * 8,
    "math-13": (4 * 1 + 7) - (4 * 0 + 7),
    "math-14": math.isqrt(144),
    "math-15": sum(face % 2 == 0 for face in range(1, 7)),
    "math-16": sum(60 % divisor == 0 for divisor in range(1, 61)),
    "math-17": 64 // 4 // 2,
    "math-18": next(x for x in range(1, 100) if x**2 == 9),
    "math-19": 12 // 3,
    "math-20": 2 * 5,
}


def write(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_built_in_has_unique_short_prompts_of_five_interleaved_categories() -> None:
    prompts = load_prompts(None, None).prompts
    assert len(prompts) == 96
    assert len({prompt.prompt_id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 96
    assert [prompt.category for prompt in prompts] == [CATEGORIES[index % 5] for index in range(96)]
    first = Counter(prompt.category for prompt in prompts[:64])
    assert max(first.values()) - min(first.values()) <= 1
    assert all(prompt.text is not None and 0 < len(prompt.text) <= 72 for prompt in prompts)


def test_built_in_maths_answers_are_right_and_only_maths_has_answers() -> None:
    answers = {prompt.prompt_id: prompt.answer for prompt in load_prompts().prompts if prompt.answer is not None}
    assert answers == {name: str(value) for name, value in COMPUTED_ANSWERS.items()}


def test_source_and_digest_name_the_file() -> None:
    whole, part = load_prompts(), load_prompts(None, 5)
    assert whole.source == "built-in"
    assert whole.sha256 == part.sha256 == hashlib.sha256(data_path("prompts.jsonl").read_bytes()).hexdigest()
    assert part.prompts == whole.prompts[:5]


def test_jsonl_takes_text_and_both_spellings_of_chat(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\u2028there"}]
    records = [
        {"prompt": "plain", "id": 7, "category": "mine", "answer": 2.5, "unknown": [1]},
        {"prompt": chat},
        {"messages": chat, "id": None},
    ]
    lines = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    loaded = load_prompts(str(write(tmp_path, "\ufeff" + lines + "\n")))
    plain, first, second = loaded.prompts
    assert (plain.prompt_id, plain.text, plain.messages) == ("7", "plain", None)
    assert (plain.category, plain.answer) == ("mine", "2.5")
    assert (first.prompt_id, first.text, first.messages) == ("line-3", None, tuple(chat))
    assert (second.prompt_id, second.messages, second.category, second.answer) == ("line-5", tuple(chat), "", None)


def test_text_file_is_one_prompt_per_line_as_it_stands(tmp_path: Path) -> None:
    loaded = load_prompts(write(tmp_path, "  indented \r\n\n   \nlast", "p.txt"))
    assert [(prompt.prompt_id, prompt.text) for prompt in loaded.prompts] == [
        ("line-1", "  indented "),
        ("line-4", "last"),
    ]


GOOD = '{"prompt": "x", "id": "a"}\n'


@pytest.mark.parametrize(
    ("second_line", "says"),
    [
        ("{", "is not valid JSON"),
        ('{"prompt": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ("[" * 200_000, "is not valid JSON"),
        ('"text"', "is not a JSON object"),
        ('{"text": "x"}', "has neither a prompt nor messages"),
        ('{"prompt": null}', "has neither a prompt nor messages"),
        ('{"prompt": "x", "messages": []}', "has both a prompt and messages"),
        ('{"prompt": 3}', "has a prompt that is neither text nor a list"),
        ('{"prompt": "  "}', "has an empty prompt"),
        ('{"prompt": "\\ud83d"}', "has a prompt with an unpaired surrogate"),
        ('{"prompt": []}', "has messages that are not a list of at least one"),
        ('{"messages": "hi"}', "has messages that are not a list of at least one"),
        ('{"messages": ["hi"]}', "has a message 1 that is not an object with exactly role and content"),
        ('{"messages": [{"role": "user"}]}', "has a message 1 that is not an object with exactly role and content"),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "with exactly role and content"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "has a message 1 with the role 'robot'"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "has a message 1 with the role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "has a message 1 whose content is not text"),
        ('{"messages": [{"role": "user", "content": ""}]}', "has an empty message 1"),
        ('{"prompt": "x", "id": true}', "has id True, which is not text or a number"),
        ('{"prompt": "x", "id": ""}', "has an empty id"),
        ('{"prompt": "x", "category": 3}', "has category 3, which is not text"),
        ('{"prompt": "x", "answer": ["3"]}', "has answer ['3'], which is not text or a number"),
        ('{"prompt": "y", "id": "a"}', "repeats the id 'a' of line 1"),
    ],
)
def test_bad_line_is_refused_with_its_number(tmp_path: Path, second_line: str, says: str) -> None:
    path = write(tmp_path, GOOD + second_line + "\n")
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert caught.value.what.startswith(f"Line 2 of {path} ")
    assert says in caught.value.what
    assert caught.value.fix


def test_invalid_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"fine\n\xff\xfe\n", "p.txt")
    with pytest.raises(PromptError, match=r"Line 2 of .* is not valid UTF-8"):
        load_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_file_without_prompts_is_refused(tmp_path: Path, content: str, name: str) -> None:
    with pytest.raises(PromptError, match="has no prompts"):
        load_prompts(write(tmp_path, content, name))


def test_missing_unreadable_and_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")
    with pytest.raises(PromptError, match=r"has the suffix '\.csv'"):
        load_prompts(tmp_path / "prompts.csv")


@pytest.mark.parametrize("limit", [97, 0, -1])
def test_limit_outside_the_set_says_how_many_there_are(limit: int) -> None:
    with pytest.raises(PromptError, match="outside 1 to 96") as caught:
        load_prompts(None, limit)
    assert isinstance(caught.value, ProbeError)


def test_data_path_refuses_a_file_that_is_not_shipped() -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        data_path("absent")


def test_loading_imports_neither_torch_nor_pandas() -> None:
    program = (
        "import sys, mismatch_probe.prompts as p; p.load_prompts();"
        "sys.exit(bool({'torch', 'pandas', 'numpy', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
