"""Words of what a recorded dump holds in place of log-probs, or what of it does not line up."""

from __future__ import annotations

from mismatch_probe.metrics.chunks import CONTRADICTED, LARGEST
from mismatch_probe.report.format import count, number, percent
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding

_PLACES = "the first of them, as file:row[index of the response token]"
_TOKENS = {
    "n": "tokens that `loss_mask` keeps",
    "share": "of the tokens of the side",
    "n_rows": "rows that have any",
    "share_of_rows": "of the rows with tokens that count",
    "places": _PLACES,
}
_SIDE = {"side": "rollout or trainer"}
_VALUE = {
    **_SIDE,
    "value": "what stands there; values beyond the first few are counted together",
    **_TOKENS,
    "stands": "tokens by place among those of a response that count: whole, first, last, runs or scattered",
}
_ROWS = {"n": "rows", "share": "of all rows", "places": "the first of them, as file:row"}
_STANDS = {
    "whole": "cover a whole response",
    "first": "are first tokens",
    "last": "are last tokens",
    "runs": "stand in runs",
    "scattered": "stand alone",
}
_REASONS = {
    "no-response": "have no response ids",
    "with-prompt": "seem to cover prompt and response",
    "with-prompt-shifted": "seem to cover prompt and response without the first token",
    "one-missing": "are one value short",
    "other": "have another length",
}
_GRIDS = {
    "bfloat16": "bfloat16 values ({} bits)",
    "float16": "float16 values ({} bits)",
    "logits": "multiples of 2^-{}, as from 16-bit logits",
    "decimals": "rounded to {} decimals",
}


def _tokens(finding: Finding) -> str:
    """`64 tokens (1.22 %) in 64 rows`."""
    n, rows = finding.whole("n"), finding.whole("n_rows")
    share = percent(finding.number("share"))
    return f"{count(n)} token{'' if n == 1 else 's'} ({share}) in {count(rows)} row{'' if rows == 1 else 's'}"


def _counted(finding: Finding, name: str, said: dict[str, str]) -> str:
    """Counts by kind, the most frequent first: `61 are last tokens, 3 stand alone`."""
    counts = finding.values[name]
    if not isinstance(counts, dict):
        return ""
    plain = {kind: int(n) for kind, n in counts.items() if isinstance(n, float)}
    return ", ".join(f"{count(n)} {said[kind]}" for kind, n in sorted(plain.items(), key=lambda item: -item[1]))


@words(
    "mismatched-lengths",
    "Rows are left out, for one of their lists does not run along the response.",
    {
        "key": "the list",
        **_ROWS,
        "reasons": "rows by probable reason: no-response, with-prompt, with-prompt-shifted, one-missing or other",
    },
    "Write one value per response token, without those of the prompt and with that of end-of-sequence; where there is "
    "none write NaN and set `loss_mask` to 0.",
)
def _lengths(finding: Finding) -> str:
    reasons = _counted(finding, "reasons", _REASONS)
    rows, share = count(finding.whole("n")), percent(finding.number("share"))
    return f"{rows} rows ({share}) are left out for the length of {finding.text('key')}: {reasons}."


@words(
    "ids-out-of-range",
    "Token ids are negative, beyond the vocabulary, or beyond 2³¹ − 1.",
    {
        "n": "ids, in prompts and responses, masked ones included",
        "n_rows": "rows that have any",
        "share_of_rows": "of all rows",
        "n_negative": "negative ids",
        "least": "smallest of the ids",
        "largest": "largest of the ids",
        "vocabulary": "ids of the model; none where it is not known",
        "places": "the first one of each row, as file:row key[index]",
    },
    "Write the ids that the model saw: leave padding out (−100 and −1 are labels), and name with --model the model "
    "that sampled.",
)
def _ids(finding: Finding) -> str:
    vocabulary = finding.maybe("vocabulary")
    known = "" if vocabulary is None else f"; the vocabulary has {count(int(vocabulary))}"
    negative, rows = count(finding.whole("n_negative")), count(finding.whole("n_rows"))
    ends = f"{finding.number('least'):.0f} to {finding.number('largest'):.0f}"
    return f"{count(finding.whole('n'))} ids in {rows} rows cannot be ids, {negative} are negative ({ends}{known})."


@words(
    "equal-sides",
    "Nearly all tokens have the same log-prob on both sides, to the bit.",
    {
        "n": "equal tokens, without those that are 0 on both sides",
        "n_compared": "tokens that can be compared",
        "share": "equal ones of these",
    },
    "Record what the engine returned while sampling (verl: `actor_rollout_ref.rollout.calculate_log_probs=True`), and "
    "the trainer's own forward pass: in bypass mode verl copies the rollout's log-probs to `old_log_probs`.",
)
def _equal(finding: Finding) -> str:
    n, total = count(finding.whole("n")), count(finding.whole("n_compared"))
    return (
        f"{n} of {total} tokens ({percent(finding.number('share'))}) are equal on both sides to the bit: one side is "
        "probably a copy or a recomputation of the other, and its gap says nothing."
    )


@words(
    "placeholder-logprobs",
    "A value stands where there is no log-prob; these tokens are left out of every metric.",
    {**_VALUE, "n_kept": "of the value 0: zeros that can be log-probs and stay"},
    "Set `loss_mask` to 0 where no log-prob was sampled: an appended end-of-sequence, tool output, padding. Elsewhere "
    "record the log-prob of the sampled id. vLLM writes −9999 for −inf and none for NaN: look for a mask or an "
    "overflow in its logits.",
)
def _placeholder(finding: Finding) -> str:
    value = finding.text("value")
    other = "trainer" if finding.text("side") == "rollout" else "rollout"
    against = f", where the {other} has less than {CONTRADICTED}" if value == "0" else ""
    kept = finding.maybe("n_kept")
    stay = f" {count(int(kept))} other zeros stay, for the {other} does not contradict them." if kept else ""
    where = _counted(finding, "stands", _STANDS)
    return f"The {finding.text('side')} has {value} at {_tokens(finding)}{against}: {where}.{stay}"


@words(
    "constant-run",
    "A log-prob repeats at more consecutive tokens than chance allows; these tokens are left out of every metric.",
    _VALUE,
    "Set `loss_mask` to 0 at padding and at text that the policy did not sample, such as tool output.",
)
def _constant(finding: Finding) -> str:
    where = _counted(finding, "stands", _STANDS)
    value, side = finding.text("value"), finding.text("side")
    return f"The {side} repeats {value} in runs that chance does not make, at {_tokens(finding)}: {where}."


@words(
    "positive-logprobs",
    "Log-probs are above 0, which no probability has; these tokens are left out of every metric.",
    {
        **_SIDE,
        **_TOKENS,
        "largest": "largest log-prob, nats",
        "n_16_bit": "of the tokens, those of at most 0.25, which a log-softmax in 16 bits leaves",
        "n_impossible": "of the tokens, those above that",
        "n_rounding": "further tokens of at most 1e-4, which float32 leaves: they stay",
    },
    "Compute logits and log-softmax in FP32 (TRL: `cast_lm_head_to_fp32=True`). Where log-probs are renormalised over "
    "top-p or top-k, take the kept mass from the same logits.",
)
def _positive(finding: Finding) -> str:
    impossible = finding.whole("n_impossible")
    usual = "a log-softmax in 16 bits makes such, and so does a kept mass that is not of the same logits"
    kind = f"{count(impossible)} are larger than 16-bit rounding makes" if impossible else usual
    largest = number(finding.number("largest"))
    return f"The {finding.text('side')} is above {LARGEST:g} at {_tokens(finding)}, at most {largest} nats: {kind}."


@words(
    "unsampled-tokens",
    "Tokens that `loss_mask` keeps were sampled by no policy.",
    {
        **_TOKENS,
        "n_version": "tokens whose weight version is −1: left out of every metric",
        "n_text": "tokens in runs inside a response, without log-prob at the rollout and unlikely at the trainer",
    },
    "Set `loss_mask` to 0 at the text of tools and of the environment.",
)
def _unsampled(finding: Finding) -> str:
    version, text = finding.whole("n_version"), finding.whole("n_text")
    said = [
        *([f"{count(version)} have weight version −1"] if version else []),
        *([f"{count(text)} stand in runs like text of the environment"] if text else []),
    ]
    return f"No policy sampled {_tokens(finding)}: {', '.join(said)}."


@words(
    "coarse-grid",
    "The log-probs of a side lie on a grid that is coarser than FP32.",
    {
        **_SIDE,
        "grid": "bfloat16, float16, logits (multiples of a power of two) or decimals",
        "digits": "bits of the significand, or decimals; of logits the negative power of two",
        "step": "of the grid, at the median log-prob where it varies, nats",
        "gap": "mean |d| of the tokens that count, nats; none where one side is recorded",
        "step_over_gap": "step over mean |d|",
        "n": "tokens that were judged, below −1/16",
    },
    "Store log-probs in FP32 with all digits; compute logits and log-softmax in FP32 (TRL: "
    "`cast_lm_head_to_fp32=True`).",
)
def _grid(finding: Finding) -> str:
    grid = _GRIDS[finding.text("grid")].format(finding.whole("digits"))
    step, ratio = number(finding.number("step")), finding.maybe("step_over_gap")
    against = "" if ratio is None else f", {number(ratio)} times mean |d|"
    return f"Log-probs of the {finding.text('side')} are {grid}: a step is {step} nats{against}."


@words(
    "duplicated-sequences",
    "Rows repeat prompt and response of an earlier row of their step, which sampling hardly does.",
    {
        "n": "rows that repeat an earlier one",
        "share": "of all rows",
        "n_total": "all rows",
        "n_sequences": "sequences that are repeated",
        "most": "rows of the most frequent one",
        "n_by_chance": "further repeats that their log-probs explain: short or near-certain responses",
        "places": "the first of them, as file:row = file:row of the first copy",
    },
    "Write every sample once (one rank of a tensor-parallel group), and give each sample of a prompt a seed of its "
    "own. Greedy sampling repeats rows too.",
)
def _copies(finding: Finding) -> str:
    n, share = count(finding.whole("n")), percent(finding.number("share"))
    chance = finding.whole("n_by_chance")
    further = f" {count(chance)} further repeats are chance." if chance else ""
    most = count(finding.whole("most"))
    return f"{n} rows ({share}) repeat an earlier row, up to {most} times the same: intervals are too narrow.{further}"


@words(
    "zeros-at-one-end",
    "Nearly every response has 0 at its first or its last token, and hardly any elsewhere.",
    {
        **_SIDE,
        "end": "first or last",
        **_TOKENS,
        "n_elsewhere": "zeros at other tokens",
    },
    "Where the token was not sampled, as an appended end-of-sequence, set `loss_mask` to 0 there. The log-probs of the "
    "other side would say which zeros are log-probs.",
)
def _zeros(finding: Finding) -> str:
    side, end = finding.text("side"), finding.text("end")
    share, elsewhere = percent(finding.number("share_of_rows")), count(finding.whole("n_elsewhere"))
    return f"The {side} has 0 at the {end} token of {share} of the responses, and at {elsewhere} other tokens."


@words("masked-all", "Rows have no token that `loss_mask` keeps.", _ROWS, "Leave them out, or check the mask.")
def _masked(finding: Finding) -> str:
    return f"{_rows(finding)} no token that `loss_mask` keeps."


@words("empty-responses", "Rows have no response token.", _ROWS, "Leave them out.")
def _no_response(finding: Finding) -> str:
    return f"{_rows(finding)} no response token."


@words(
    "empty-prompts",
    "Rows have no prompt token; no engine can score their first token.",
    _ROWS,
    "Record the ids of the prompt, at least begin-of-sequence.",
)
def _no_prompt(finding: Finding) -> str:
    return f"{_rows(finding)} no prompt token."


def _rows(finding: Finding) -> str:
    n = finding.whole("n")
    return f"{count(n)} row{' has' if n == 1 else 's have'}"
