"""The generic format: what a recorded sequence can hold, under which keys. Every reader translates to these.

The lists of a row run along its response, or, where the row has `token_ids` in place of prompt and response, along all
of its tokens; `prompt_length`, or else the first 1 of `loss_mask`, says where the response begins. `attention_mask`
says what is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ids", "logprob", "mask", "integer", "number", "label"]
Per = Literal["list", "token", "row"]


@dataclass(frozen=True)
class Key:
    """A key of the generic format.

    Attributes:
        name: The key.
        kind: What its values are: `ids` and `integer` of 32 and 64 bits, `logprob` and `number` in float64, where null
            is NaN, `mask` 0 or 1, `label` a text or an integer.
        per: `list` for a list of its own length, `token` for a list with a value per response token, `row` for one
            value. A single `integer` or `number` per token stands for all tokens of its row.
        meaning: In a few words.
        uniform: Whether it is in every row or in none: with holes, two metrics of a file would be of different tokens.
    """

    name: str
    kind: Kind
    per: Per
    meaning: str
    uniform: bool = False


_ALL = (
    Key("prompt_token_ids", "ids", "list", "the ids that the model saw"),
    Key("response_token_ids", "ids", "list", "the ids that were sampled, end-of-sequence included"),
    Key("rollout_logprobs", "logprob", "token", "b, of the distribution that sampled them, nats", uniform=True),
    Key("trainer_logprobs", "logprob", "token", "a, of the trainer at the same weights, nats", uniform=True),
    Key("loss_mask", "mask", "token", "1 for the tokens that count; without it all do", uniform=True),
    Key("trainer_logprobs_2", "logprob", "token", "a second trainer pass, e.g. that of the update", uniform=True),
    Key("rollout_prefill_logprobs", "logprob", "token", "the rollout engine's own prefill of the ids", uniform=True),
    Key("ref_logprobs", "logprob", "token", "the reference model of the RL run", uniform=True),
    Key("trainer_entropy", "number", "token", "entropy of the trainer's distribution, nats", uniform=True),
    Key("weight_version", "integer", "token", "weights that sampled the token; -1 where none did", uniform=True),
    Key("turn", "integer", "token", "turn of a conversation", uniform=True),
    Key("advantages", "number", "token", "advantage", uniform=True),
    Key("step", "integer", "row", "training step", uniform=True),
    Key("trainer_version", "integer", "row", "weights that the trainer scored with", uniform=True),
    Key("pack_index", "integer", "row", "place of the sequence in its packed row, from 0", uniform=True),
    Key("pack_id", "label", "row", "packed row that the sequence was scored in"),
    Key("prompt_id", "label", "row", "makes one cluster of an interval; else equal prompts do", uniform=True),
    Key("reward", "number", "row", "reward"),
    Key("replica", "label", "row", "engine or rank that made the row"),
    Key("tags", "label", "row", "task or data set"),
    Key("finish_reason", "label", "row", "why the response ended"),
)
KEYS: dict[str, Key] = {key.name: key for key in _ALL}
PROMPT, RESPONSE = "prompt_token_ids", "response_token_ids"
IDS = (PROMPT, RESPONSE)
SIDES = ("rollout_logprobs", "trainer_logprobs")
"""Of which a row needs at least one."""
PER_TOKEN: tuple[str, ...] = tuple(key.name for key in _ALL if key.per == "token")
PER_ROW: tuple[str, ...] = tuple(key.name for key in _ALL if key.per == "row")
# A whole sequence in place of prompt and response.
WHOLE, LENGTH = "token_ids", "prompt_length"
# 0 where a padded sequence has no token: along the whole, along prompt and response, or along the prompt.
ATTENTION = "attention_mask"
NAMED = frozenset({*KEYS, WHOLE, LENGTH, ATTENTION})
"""Every key of the generic format."""
