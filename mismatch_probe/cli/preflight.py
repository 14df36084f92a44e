"""`mismatch-probe preflight`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import NameList, json_option
from mismatch_probe.cli.output import print_json
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK
from mismatch_probe.types import DTYPES


@click.command(epilog="Exit codes: 0 it can be compared, 1 error, 2 usage, 3 something will fail.")
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="The checkpoint may run its own Python code.")
@click.option("--prompts", type=click.Path(), help="Prompt file, .jsonl or .txt.  [default: no prompts]")
@click.option("--chat", is_flag=True, default=None, help="Plain prompts are rendered by the chat template.")
@click.option("--max-tokens", type=int, help="Longest response.")
@click.option("--rollout-dtypes", type=NameList(DTYPES), help="What vLLM runs in.  [default: all three]")
@click.option("--trainer-attn", help="Attention of transformers: sdpa, eager, …  [default: the model's own]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@json_option
def command(model: str, as_json: bool, **options: Any) -> int:
    """Can this checkpoint be compared, and what would surprise its user? Starts no engine.

    Reads headers and configuration, no weights: files, shapes, tokenizer, lengths, declarations that an engine ignores,
    memory. Every command that starts an engine does the same first.

    \b
    Examples:
      mismatch-probe preflight ./my-checkpoint
      mismatch-probe preflight ./my-checkpoint --prompts chats.jsonl --max-tokens 4096 --rollout-dtypes bf16,fp16
    """
    document = mismatch_probe.preflight(model, **{name: value for name, value in options.items() if value is not None})
    if as_json:
        print_json(document.content())
    else:
        from rich.console import Console

        from mismatch_probe.report.preflight import preflight_report
        from mismatch_probe.report.render.terminal import print_report

        print_report(preflight_report(document), Console())
    return EXIT_LIMIT if document.of("fail") else EXIT_OK
