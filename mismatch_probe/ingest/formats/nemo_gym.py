"""NeMo-Gym: rollouts, a line each, and the records of its token capture, a line per call of the model.

Read from `nemo_gym/openai_utils.py` (`TokenIDLogProbMixin`), `nemo_gym/token_id_capture/records.py` and
`nemo_gym/rollout_collection.py`. Of a rollout, the output items that a call of the model produced carry its whole
prompt, its ids and their log-probs; other items carry empty lists, or none.
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.turns import rows_with, turn_of

_KEYS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
_SWITCH = "Set return_token_id_information: true in the model server's configuration."


@dump_format(
    "nemo-gym",
    project="NeMo-Gym",
    version="0.5",
    containers=("jsonl", "json"),
    layouts=(_KEYS[:2], ("response", "responses_create_params")),
    beside=("_failures.jsonl", "_materialized_inputs.jsonl"),
    switch=_SWITCH,
    sides="rollout",
)
def nemo_gym(record: Record) -> Iterator[Row]:
    """A rollout, or a call of the model."""
    parts = [record] if _KEYS[1] in record.fields else record.inside("response").each("output")
    calls = [part for part in parts if part.fields.get(_KEYS[1])]
    if not calls:
        record.refuse(f"has no output item with {_KEYS[1]}", _SWITCH)
    turns = [turn_of(call, _KEYS, number) for number, call in enumerate(calls)]
    yield from rows_with(turns, reward=record.fields.get("reward"))
