"""token-difr: prompts and outputs as ids, `{config, samples: [{prompt_token_ids, outputs: [{token_ids}]}]}`."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE


@dump_format(
    "token-difr",
    project="token-difr",
    version="of 2026",
    containers=("json", "jsonl"),
    layouts=(("config", "samples"),),
    sides="neither",
)
def token_difr(record: Record) -> Iterator[Row]:
    """The outputs of all samples."""
    for sample in record.each("samples"):
        for output in sample.each("outputs"):
            yield {
                PROMPT: sample.need("prompt_token_ids"),
                RESPONSE: output.need("token_ids"),
                "finish_reason": output.fields.get("finish_reason"),
            }
