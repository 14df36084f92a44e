from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.report import view
from mismatch_probe.report.data import Curves, ReportData
from mismatch_probe.report.matrix import diagonal_pairs, metric_matrix, null_of
from mismatch_probe.report.notes import notes

if TYPE_CHECKING:
    from conftest import SummaryFactory


def test_limits_come_worst_first_and_name_their_pair(data: ReportData) -> None:
    lines = view.limit_lines(data.summary)
    assert [line.state for line in lines] == ["exceeded", "not judged", "within"]
    assert lines[0].text == "kl_k3>0.001@bfloat16/bfloat16: measured 2.00e-3"
    assert lines[1].text == "ess_seq>2@float16: measured – (tokens are not finite)"
    assert lines[2].text == "kl_k3>1 at bfloat16/bfloat16: measured 2.00e-3"
    assert view.verdict(data.summary) == ("exceeded", "Limits: 1 exceeded, 1 not judged, 1 within.")


def test_without_limits_the_verdict_says_so() -> None:
    assert view.verdict({})[0] == "none"
    assert "No limits were set" in view.verdict({})[1]


def test_a_limit_that_was_exceeded_without_a_number_stays_exceeded() -> None:
    summary = {"limits": [{"limit": "kl_k3>1", "value": None, "exceeded": True}]}
    assert view.verdict(summary)[0] == "exceeded"


def test_the_null_of_a_pair_is_the_larger_side() -> None:
    side = {"mean_abs_logprob_diff": 1e-4}
    assert null_of({"null": {"rollout": side, "trainer": {"mean_abs_logprob_diff": 3e-4}}}) == 3e-4
    assert null_of({"null": {"rollout": side, "trainer": None}}) == 1e-4
    assert null_of({"null": {"rollout": None, "trainer": None}}) is None
    assert null_of({}) is None


def test_dtypes_are_ordered_from_few_bits_to_many(make_summary: SummaryFactory) -> None:
    matrix = metric_matrix(make_summary(("float32", "float16", "bfloat16")))
    assert matrix.rows == matrix.columns == ("bfloat16", "float16", "float32")


def test_a_pair_that_was_neither_compared_nor_reported_missing_is_said_not_to_have_run() -> None:
    metrics = {"mean_abs_logprob_diff": {"value": 1.0}}
    pairs = [{"rollout_dtype": dtype, "trainer_dtype": dtype, "metrics": metrics} for dtype in ("bfloat16", "float16")]
    assert metric_matrix({"pairs": pairs}).cell("bfloat16", "float16").why == "not run"


def test_notes_tell_what_limits_the_numbers_once(make_summary: SummaryFactory) -> None:
    summary = make_summary(("bfloat16", "float16"))
    for pair in summary["pairs"]:
        pair["metrics"]["kl_k3"]["why"] = "uncalibrated: 8 prompts"
    summary["pairs"][0]["metrics"]["ess_seq"]["why"] = "fewer than 10 effective sequences"
    summary["pairs"][1]["on_policy"] = False
    found = notes(ReportData(summary, {"status": "running"}, Curves(), []))
    assert found[0] == "The run is running: numbers cover finished passes only."
    assert found[1].startswith("bfloat16 → float16: the rollout policy did not sample")
    assert sum("uncalibrated: 8 prompts." in note and "all pairs" in note for note in found) == 1
    assert sum("bfloat16 → bfloat16: fewer than 10 effective" in note for note in found) == 1
    assert len(found) == 4


def test_what_several_pairs_and_metrics_share_is_noted_once(exact: ReportData) -> None:
    for pair in exact.summary["pairs"]:
        for key in ("kl_k3", "kl_exact", "ess_seq"):
            metric = pair["metrics"][key]
            if metric["value"] is not None:
                metric["why"] = "uncalibrated: 8 prompts"
    assert notes(exact) == [
        "float16 → all, float32 → all: these tokens were sampled by A, so metrics that need the rollout policy's own "
        "are absent.",
        "KL k3, KL exact, ESS, all pairs: uncalibrated: 8 prompts.",
    ]


def test_exact_values_that_nobody_asked_for_are_not_noted_as_absent(make_summary: SummaryFactory) -> None:
    summary = make_summary(("bfloat16",))
    summary["pairs"][0]["metrics"]["kl_exact"] = {"value": None, "why": "no rows of logits were kept"}
    assert notes(ReportData(summary, {}, Curves(), [])) == []


def test_what_a_file_recorded_is_on_the_diagonal_with_every_trainer() -> None:
    pairs = [
        {"rollout_dtype": rollout, "trainer_dtype": trainer, "metrics": {"kl_k3": {"value": 1.0}}}
        for rollout, trainer in (("recorded", "recorded"), ("recorded", "float16"), ("float16", "float32"))
    ]
    assert list(diagonal_pairs({"pairs": pairs})) == ["recorded → float16", "recorded"]
    assert view.metrics_table({"pairs": pairs}).header == ("metric", "recorded → float16", "recorded", "formula")


def test_metrics_table_has_a_column_per_diagonal_pair_and_the_formula(data: ReportData) -> None:
    table = view.metrics_table(data.summary)
    assert table.header == ("metric", "bfloat16", "float16", "float32", "formula")
    row = next(row for row in table.rows if row[0].endswith("\nkl_k3"))
    assert row[1] == "1.60e-3\n[1.28e-3, 2.08e-3]"
    assert row[-1]
    assert next(row for row in table.rows if row[0].endswith("\npareto_k"))[1] == "–\nfewer than 200 sequences"


def test_passes_count_what_was_lost(data: ReportData) -> None:
    done, refused = view.passes_table(data.manifest).rows
    assert done == (
        "vllm-bfloat16-decode",
        "complete",
        "64",
        "10,240",
        "0",
        "12",
        "1",
        "2",
        "not promised\nbatches form by arrival",
    )
    assert refused[1:4] == ("refused\nfloat16 overflows in this model", "–", "–")


def test_provenance_flattens_the_manifest(data: ReportData) -> None:
    entries = {row[0]: row[1] for row in view.provenance_table(data.manifest).rows}
    assert entries["model.files.model.safetensors"] == "ab" * 32
    assert entries["config.dtypes"] == '["bfloat16", "float16"]'
    assert entries["environment.gpu"] == "–"


def test_worst_tokens_keep_what_stands_next_to_the_token(data: ReportData) -> None:
    token = data.worst_tokens[0]
    (row,) = view.worst_rows(
        [type(token)(**(vars(token) | {"context": "a" * 300 + "end", "token_text": "start" + "b" * 300}))]
    )
    assert row.context.startswith("…")
    assert row.context.endswith("end")
    assert row.token.startswith("start")
    assert row.token.endswith("…")
    assert len(row.context) + len(row.token) < 300
