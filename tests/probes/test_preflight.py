"""Preflight: every check with a planted fault, nothing on a clean checkpoint, and no weights read."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.engines import declarations
from mismatch_probe.engines.models import resolve
from mismatch_probe.errors import ModelError
from mismatch_probe.probes.preflight import Use, all_checks, resources
from mismatch_probe.probes.preflight.run import guard, preflight
from mismatch_probe.probes.preflight.shapes import PLANNED
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.words import say
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import Prompt
from tests.factories.checkpoint import LLAMA, LLAMA_7B, llama_shapes, write_checkpoint, write_safetensors

Q = "model.layers.1.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def look(path: Path, /, **use: Any) -> list[Finding]:
    return list(preflight(resolve(str(path)), Use(**use)).findings)


def outcome(path: Path, /, **use: Any) -> dict[str, str]:
    """Severity by code."""
    found = look(path, **use)
    assert all(say(finding) for finding in found)
    return {finding.code: finding.severity for finding in found}


def only(path: Path, code: str, /, **use: Any) -> Finding:
    """The one finding above info."""
    found = [finding for finding in look(path, **use) if finding.severity != "info"]
    assert [finding.code for finding in found] == [code]
    assert say(found[0])
    return found[0]


def changed(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))
    return folder


def resized(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", shards=3)


def test_a_clean_checkpoint_has_no_finding(clean: Path, sharded: Path) -> None:
    for folder in (clean, sharded):
        document = preflight(resolve(str(folder)), Use(max_tokens=32, device="cpu", bytes_per_weight=4))
        assert document.findings == ()
    assert document.checkpoint.parameters == sum(
        shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in llama_shapes(LLAMA).values()
    )
    assert document.checkpoint.files == 3
    assert document.checkpoint.dtypes == {"BF16": document.checkpoint.parameters}
    assert [run.name for run in document.checks if run.skipped_for] == []


def test_7b_takes_less_than_two_seconds(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", LLAMA_7B, shards=3, ids=32_000)
    assert sum(f.stat().st_blocks for f in folder.iterdir()) * 512 < 10_000_000
    resolved, began = resolve(str(folder)), time.process_time()
    document = preflight(resolved, Use(max_tokens=64, prompts=(Prompt("a", "text " * 4000),)))
    assert time.process_time() - began < 2
    assert document.checkpoint.parameters == 6_738_415_616
    assert [finding.code for finding in document.findings] == []


class TestFiles:
    def test_a_missing_shard(self, sharded: Path) -> None:
        (sharded / SHARD).unlink()
        found = only(sharded, "weights-missing")
        assert (found.severity, found.where, found.values["files"]) == ("fail", SHARD, 3)

    @pytest.mark.parametrize("by", [-1, -9_000])
    def test_a_truncated_shard(self, sharded: Path, by: int) -> None:
        resized(sharded / SHARD, by)
        found = only(sharded, "weights-truncated")
        assert found.where == SHARD
        assert found.number("bytes") - found.number("wanted") == by

    @pytest.mark.parametrize("size", [0, 4, 100])
    def test_a_cut_header(self, clean: Path, size: int) -> None:
        os.truncate(clean / "model.safetensors", size)
        assert only(clean, "weights-truncated").number("bytes") == size

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda path: resized(path, 8), "longer"),
            (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0[[[[[[[["), "malformed"),
            (lambda path: path.write_bytes(b"\xff" * 100), "malformed"),
            (
                lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                "lfs-pointer",
            ),
        ],
    )
    def test_a_damaged_file(self, clean: Path, damage: Callable[[Path], object], problem: str) -> None:
        damage(clean / "model.safetensors")
        assert only(clean, "weights-damaged").text("problem") == problem

    def test_offsets_that_do_not_fit_a_shape(self, clean: Path) -> None:
        path = clean / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"shape": [64, 96]', b'"shape": [64, 95]', 1))
        assert only(clean, "weights-damaged").text("problem") == "malformed"

    def test_no_weights(self, clean: Path) -> None:
        (clean / "model.safetensors").rename(clean / "model.gguf")
        assert only(clean, "weights-none").names("others") == ("model.gguf",)

    def test_no_tokenizer(self, clean: Path) -> None:
        (clean / "tokenizer.json").unlink()
        assert only(clean, "tokenizer-none").severity == "fail"

    def test_a_file_that_is_not_json(self, clean: Path) -> None:
        (clean / "generation_config.json").write_text("{")
        assert only(clean, "file-unreadable").where == "generation_config.json"

    def test_pickled_weights_are_loaded_and_not_checked(self, clean: Path) -> None:
        (clean / "model.safetensors").unlink()
        with zipfile.ZipFile(clean / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80" * 10_000)
        (clean / "training_args.bin").write_bytes(b"x")
        assert outcome(clean) == {"weights-pickled": "info"}
        resized(clean / "pytorch_model.bin", -100)
        assert outcome(clean)["weights-truncated"] == "fail"

    def test_an_index_that_names_what_no_file_has(self, sharded: Path) -> None:
        index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
        changed(sharded, "model.safetensors.index.json", weight_map=index | {"model.extra.weight": SHARD})
        found = only(sharded, "index-absent")
        assert (found.severity, found.where, found.text("file")) == ("fail", "model.extra.weight", SHARD)

    def test_an_index_that_differs_from_the_files(self, sharded: Path) -> None:
        index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
        wrong = next(file for file in sorted(set(index.values())) if file != index[Q])
        changed(sharded, "model.safetensors.index.json", weight_map=index | {Q: wrong})
        assert only(sharded, "index-moved").where == Q
        del index[Q]
        changed(sharded, "model.safetensors.index.json", weight_map=index)
        assert only(sharded, "index-unlisted").where == Q

    def test_two_sets_of_weights(self, sharded: Path) -> None:
        write_safetensors(sharded / "model.safetensors", llama_shapes(LLAMA))
        assert only(sharded, "files-two-checkpoints").severity == "fail"

    def test_shards_without_an_index(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").unlink()
        assert only(sharded, "files-no-index").severity == "fail"

    def test_files_that_only_vllm_reads(self, clean: Path) -> None:
        write_safetensors(clean / "other.safetensors", {"a": [2]})
        assert only(clean, "files-extra").severity == "fail"

    def test_files_that_the_index_leaves_out(self, sharded: Path) -> None:
        write_safetensors(sharded / "other.safetensors", {"a": [2]})
        assert outcome(sharded) == {"files-extra": "info"}
        write_safetensors(sharded / "consolidated.safetensors", {"a": [2]})
        assert only(sharded, "files-extra").severity == "warn"

    def test_an_adapter_as_model(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        with pytest.raises(ModelError, match="PEFT adapter of org/base") as raised:
            resolve(str(tmp_path))
        assert "merge_and_unload" in raised.value.fix

    def test_an_adapter_beside_the_weights(self, clean: Path) -> None:
        changed(clean, "adapter_config.json", base_model_name_or_path="org/base")
        assert only(clean, "files-adapter").text("base") == "org/base"


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            (Q, [32, 64]),
            ("model.layers.2.self_attn.k_proj.weight", [64, 64]),
            ("model.layers.0.mlp.down_proj.weight", [96, 64]),
            ("model.layers.0.input_layernorm.weight", [63]),
            ("model.embed_tokens.weight", [130, 64]),
            ("lm_head.weight", [128, 63]),
        ],
    )
    def test_a_tensor_of_another_shape(self, tmp_path: Path, name: str, shape: list[int]) -> None:
        folder = write_checkpoint(tmp_path / "m", shapes=llama_shapes(LLAMA) | {name: shape})
        found = only(folder, "shape-differs")
        assert (found.severity, found.where, found.text("found")) == ("fail", name, str(shape))

    def test_a_configuration_of_another_size(self, clean: Path) -> None:
        changed(clean, "config.json", hidden_size=32)
        assert only(clean, "shape-differs").number("tensors") > 20

    @pytest.mark.parametrize(("declared", "code"), [(4, "layers-missing"), (2, "layers-unused")])
    def test_another_number_of_layers(self, clean: Path, declared: int, code: str) -> None:
        changed(clean, "config.json", num_hidden_layers=declared)
        assert only(clean, code).number("declared") == declared

    def test_layers_for_further_tokens_are_expected(self, clean: Path) -> None:
        changed(clean, "config.json", num_hidden_layers=2, num_nextn_predict_layers=1)
        assert outcome(clean) == {"layers-unused": "info"}

    def test_layers_that_are_passed_through_again_are_no_further_ones(self, clean: Path) -> None:
        changed(clean, "config.json", num_hidden_layers=12, num_layers_per_stack=3)
        assert outcome(clean) == {}

    def test_layers_of_a_vision_tower_have_sizes_of_their_own(self, tmp_path: Path) -> None:
        tower = {"vision_tower.encoder.layers.0.self_attn.k_proj.weight": [8, 8]}
        config = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}
        folder = write_checkpoint(tmp_path, config, shapes={**llama_shapes(LLAMA), **tower})
        assert "shape-differs" not in outcome(folder)

    @pytest.mark.parametrize("name", [Q, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
    def test_a_missing_tensor(self, tmp_path: Path, name: str) -> None:
        shapes = llama_shapes(LLAMA)
        del shapes[name]
        assert only(write_checkpoint(tmp_path / "m", shapes=shapes), "tensors-missing").where == name

    @pytest.mark.parametrize("name", ["v_head.weight", "model.layers.0.self_attn.q_proj.weight_scale", "score.weight"])
    def test_a_tensor_that_no_engine_loads(self, tmp_path: Path, name: str) -> None:
        folder = write_checkpoint(tmp_path / "m", shapes=llama_shapes(LLAMA) | {name: [1]})
        found = only(folder, "tensors-unused")
        assert (found.severity, found.where) == ("warn", name)

    def test_a_buffer_that_older_files_have_is_harmless(self, tmp_path: Path) -> None:
        shapes = llama_shapes(LLAMA) | {"model.layers.0.self_attn.rotary_emb.inv_freq": [8]}
        assert look(write_checkpoint(tmp_path / "m", shapes=shapes)) == []

    def test_tied_embeddings_with_a_head_of_its_own(self, clean: Path) -> None:
        changed(clean, "config.json", tie_word_embeddings=True)
        assert only(clean, "head-tied-and-stored").where == "lm_head.weight"


class TestText:
    def test_a_tokenizer_that_is_too_large(self, tmp_path: Path) -> None:
        found = only(write_checkpoint(tmp_path / "m", ids=129), "vocabulary-too-small")
        assert (found.severity, found.number("largest_id"), found.number("rows")) == ("fail", 128, 128)

    def test_an_added_token_counts(self, clean: Path) -> None:
        changed(clean, "tokenizer.json", added_tokens=[{"id": 200, "content": "<x>"}])
        found = only(clean, "vocabulary-too-small")
        assert (found.severity, found.number("largest_id")) == ("warn", 200)

    @pytest.mark.parametrize("chat", [True, False])
    def test_messages_without_a_template(self, clean: Path, chat: bool) -> None:
        prompt = Prompt("p", "t1") if chat else Prompt("p", messages=({"role": "user", "content": "t1"},))
        assert only(clean, "chat-template-none", prompts=(prompt,), chat=chat).where == "p"
        for file, content in (("tokenizer_config.json", {"chat_template": "x"}), ("chat_template.jinja", {})):
            (clean / file).write_text(json.dumps(content))
            assert look(clean, prompts=(prompt,), chat=chat) == []
            (clean / file).unlink()

    @pytest.mark.parametrize(
        ("words", "max_tokens", "code"),
        [
            (1, 500, ""),
            (2, 600, "responses-cut"),
            (512, 4, "prompt-too-long"),
            (510, 8, "responses-cut"),
            (400, 100, ""),
        ],
    )
    def test_prompts_and_responses_against_the_context(
        self, clean: Path, words: int, max_tokens: int, code: str
    ) -> None:
        changed(clean, "tokenizer.json", pre_tokenizer={"type": "Whitespace"}, version="1.0")
        prompts = (Prompt("short", "t1"), Prompt("long", " ".join(["t2"] * words)))
        found = look(clean, prompts=prompts, max_tokens=max_tokens)
        assert [finding.code for finding in found] == ([code] if code else [])
        if code == "prompt-too-long":
            assert (found[0].where, found[0].values["tokens"]) == ("long", 512)


class TestDeclared:
    def test_a_dtype_that_vllm_does_not_support(self, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "mismatch_probe.engines.vllm.unsupported.float16_unsupported", lambda: {"llama": "It overflows."}
        )
        assert only(clean, "dtype-unsupported").severity == "warn"
        assert only(clean, "dtype-unsupported", rollout_dtypes=("float16",)).severity == "fail"
        assert look(clean, rollout_dtypes=("bfloat16",)) == []

    @pytest.mark.parametrize(
        ("config", "use", "code", "severity"),
        [
            ({"model_type": "nobody"}, {}, "architecture-unknown", "fail"),
            ({"model_type": "nobody", "auto_map": {"AutoConfig": "x.Y"}}, {}, "code-needed", "fail"),
            (
                {"model_type": "nobody", "auto_map": {"AutoConfig": "x.Y"}},
                {"trust_remote_code": True},
                "code-used",
                "warn",
            ),
            ({"auto_map": {"AutoConfig": "x.Y"}}, {}, "code-unused", "info"),
            ({"architectures": ["Olmo2ForCausalLM"]}, {}, "architecture-by-transformers", "info"),
            ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, {}, "rope-unknown", "fail"),
            ({"rope_scaling": {"type": "linear", "factor": 2}}, {}, "", ""),
            ({"logit_scale": 0.5}, {}, "declaration-ignored", "warn"),
            ({"logit_scale": 1.0}, {}, "", ""),
            ({"sliding_window": 16}, {"max_tokens": 17}, "declaration-ignored", "warn"),
            ({"sliding_window": 16}, {"max_tokens": 16}, "declaration-ignored", "info"),
        ],
    )
    def test_architecture_and_declarations(
        self, clean: Path, monkeypatch: pytest.MonkeyPatch, config: Any, use: Any, code: str, severity: str
    ) -> None:
        kinds = frozenset({"default", "linear"})
        vllm = declarations.Known(frozenset({"LlamaForCausalLM", "Olmo2ForCausalLM"}), kinds, {"Olmo2ForCausalLM"})
        hf = declarations.Known(frozenset({"llama"}), kinds)
        for name, known in (("vllm", vllm), ("transformers", hf)):
            monkeypatch.setattr(f"mismatch_probe.probes.preflight.declared.known_to_{name}", lambda found=known: found)
        assert outcome(changed(clean, "config.json", **config), **use).get(code, "") == severity

    @pytest.mark.parametrize(
        ("config", "use", "does", "severity"),
        [
            ({"model_type": "gemma2"}, {}, "ignored", "warn"),
            ({"model_type": "gemma2"}, {"attention": "eager"}, "", ""),
            ({"model_type": "gemma2", "attn_logit_softcapping": None}, {}, "", ""),
            ({"model_type": "olmoe", "clip_qkv": 5.0}, {}, "ignored", "warn"),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, {}, "unsupported", "fail"),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, {}, "", ""),
            ({"model_type": "cohere2", "sliding_window": 8}, {"max_tokens": 9}, "shifted", "warn"),
            ({"model_type": "gptj", "tie_word_embeddings": True}, {}, "unsupported", "fail"),
            ({"model_type": "gpt_oss", "tie_word_embeddings": True}, {}, "", ""),  # the file has a head
        ],
    )
    def test_declarations_of_families(
        self, clean: Path, config: dict[str, Any], use: Any, does: str, severity: str
    ) -> None:
        found = outcome(changed(clean, "config.json", **config), **use)
        assert {c: s for c, s in found.items() if c.startswith("declaration-")} == (
            {f"declaration-{does}": severity} if does else {}
        )

    def test_a_tied_head_that_vllm_does_not_tie(self, tmp_path: Path) -> None:
        config = LLAMA | {"model_type": "gpt_oss", "tie_word_embeddings": True}
        assert outcome(write_checkpoint(tmp_path / "m", config))["declaration-ignored"] == "fail"

    def test_a_head_that_cannot_be_seen_is_no_finding(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", LLAMA | {"model_type": "gpt_oss", "tie_word_embeddings": True})
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "declaration-ignored" not in outcome(folder)

    @pytest.mark.parametrize(("package", "severity"), [("no_such_package", "fail"), ("json", "warn")])
    def test_quantised(self, clean: Path, monkeypatch: pytest.MonkeyPatch, package: str, severity: str) -> None:
        monkeypatch.setattr("mismatch_probe.probes.preflight.declared._PACKAGES", {"awq": package})
        changed(clean, "config.json", quantization_config={"quant_method": "awq"}, hidden_size=1)
        code = "quantised-package-missing" if severity == "fail" else "weights-quantised"
        found = only(clean, code)  # shapes are those of packed tensors, so they are not compared
        assert (found.severity, found.where) == (severity, "awq")

    @pytest.mark.parametrize(
        ("written", "changes"),
        [
            ({"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20.0}),
            ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
            ({"temperature": 1.0, "top_p": 1, "repetition_penalty": 1.0, "eos_token_id": 2, "do_sample": True}, {}),
        ],
    )
    def test_generation_config(self, clean: Path, written: dict[str, Any], changes: dict[str, float]) -> None:
        changed(clean, "generation_config.json", **written)
        if changes:
            assert dict(only(clean, "sampling-changed").values) == changes
        else:
            assert look(clean) == []

    def test_further_stop_ids(self, clean: Path) -> None:
        changed(clean, "generation_config.json", eos_token_id=[2, 7])
        (found,) = look(clean)
        assert (found.code, found.severity, found.text("ids")) == ("stops-added", "info", "7")

    def test_every_row_is_still_true_of_what_is_installed(self) -> None:
        """Breaks with an upgrade: read the file again, and change or remove the row."""
        moved = [
            (one.key, one.model_types, evidence.file)
            for one in declarations.DECLARATIONS
            for evidence in one.evidence
            if declarations.holds(evidence) is False
        ]
        assert moved == []

    def test_what_the_engines_know_is_read_from_their_source(self) -> None:
        vllm, transformers = declarations.known_to_vllm(), declarations.known_to_transformers()
        if vllm is None or transformers is None:
            pytest.skip("an engine is not installed")
        assert "LlamaForCausalLM" in vllm.names - vllm.borrowed
        assert {"default", "llama3", "yarn", "longrope"} <= vllm.rope_types & transformers.rope_types
        assert set(PLANNED) <= transformers.names


class TestResources:
    @pytest.mark.parametrize(
        ("device", "total", "free", "severity"),
        [("cpu", 10, 5, "fail"), ("cpu", 10**9, 5, "warn"), ("cuda", 10, 5, "warn"), ("cpu", 10**9, 10**9, "")],
    )
    def test_memory(
        self, clean: Path, monkeypatch: pytest.MonkeyPatch, device: Any, total: int, free: int, severity: str
    ) -> None:
        monkeypatch.setattr(resources, "memory_bytes", lambda device: (total, free))
        assert outcome(clean, device=device, bytes_per_weight=4).get("memory-short", "") == severity

    def test_disk(self, clean: Path, tmp_path: Path) -> None:
        found = only(clean, "disk-short", device="cpu", disk_bytes=1 << 60, folder=tmp_path / "new" / "run")
        assert (found.severity, found.where) == ("fail", str(tmp_path))

    def test_what_vanishes_while_it_is_counted(self, clean: Path, tmp_path: Path) -> None:
        (tmp_path / "gone").symlink_to(tmp_path / "nothing")
        (tmp_path / "part").write_bytes(bytes(10))
        walked = [(str(tmp_path), [], ["gone", "part", "removed meanwhile"])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resources.os, "walk", lambda _: iter(walked))
            found = preflight(resolve(str(clean)), Use(folder=tmp_path)).findings
        assert not [one for one in found if one.code == "disk-short"]


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class TestGuard:
    def test_what_fails_stops_with_one_error(self, sharded: Path) -> None:
        resized(sharded / SHARD, -1)
        (sharded / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=f"{SHARD} is truncated") as raised:
            guard(resolve(str(sharded)), Use(), Told())
        assert f"mismatch-probe preflight {sharded}" in raised.value.fix

    def test_what_surprises_is_a_few_lines(self, clean: Path) -> None:
        changed(clean, "config.json", logit_scale=0.5, tie_word_embeddings=True)
        changed(clean, "generation_config.json", top_k=5, eos_token_id=[2, 3])
        told = Told()
        guard(resolve(str(clean)), Use(), told)
        assert len(told.lines) == 3

    def test_a_comparison_does_not_start_an_engine(self, clean: Path, tmp_path: Path) -> None:
        resized(clean / "model.safetensors", -1)
        with pytest.raises(ModelError, match="truncated"):
            mismatch_probe.compare(model=str(clean), device="cpu", out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_the_scripted_model_has_nothing_to_check(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "scripted"}))
        guard(resolve(str(tmp_path)), Use(), Told())


def test_a_check_without_what_it_needs_is_skipped(clean: Path) -> None:
    resized(clean / "model.safetensors", -1)
    skipped = {run.name: run.skipped_for for run in preflight(resolve(str(clean)), Use()).checks if run.skipped_for}
    assert skipped["shapes"] == ("tensors",)
    assert skipped["memory"] == ("run",)
    assert set(skipped) < set(all_checks())
