"""What a comparison will run: passes, sequences, and a rough estimate of time, memory and disk. Runs nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.probes.progress import Progress
from mismatch_probe.prompts import PromptSet, load_prompts
from mismatch_probe.types import DTYPES, Dtype, EncodedPrompt, RolloutRequest, TrainerMode

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Sustained FLOP/s of matrix products: per CPU core as measured on 2-core machines without and with BF16 instructions,
# assumed for a GPU. Good to a factor of two or three, which is what an estimate beforehand needs.
_CPU_RATE = {"bfloat16": (5e9, 100e9), "float16": (6e9, 14e9), "float32": (30e9, 56e9)}
_GPU_RATE = {"bfloat16": 1e14, "float16": 1e14, "float32": 1.5e13}
_START_SECONDS = 15.0
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class TrainerPass:
    """A column of the matrix."""

    dtype: Dtype
    mode: TrainerMode

    @property
    def pass_id(self) -> str:
        return f"hf-{self.dtype}-{self.mode}"


def trainer_passes(config: CompareConfig) -> list[TrainerPass]:
    """Columns of the matrix. Autocast applies to 16-bit types only: FP32 always has the one mode `cast`."""
    return [
        TrainerPass(dtype, mode)
        for dtype in config.trainer_dtypes
        for mode in (config.trainer_modes if dtype != "float32" else ("cast",))
    ]


def rollout_pass_id(dtype: str) -> str:
    return f"vllm-{dtype}-decode"


def null_pass_id(pass_id: str) -> str:
    """The pass that produces some of a pass's tokens a second time."""
    return f"{pass_id}-null"


@dataclass(frozen=True)
class Plan:
    """A comparison with every default filled in."""

    config: CompareConfig
    model: ModelRef
    prompts: PromptSet
    device: devices.Device
    sizes: devices.Sizes

    @property
    def trainers(self) -> list[TrainerPass]:
        return trainer_passes(self.config)

    def requests(self, dtype: Dtype, encoded: list[EncodedPrompt]) -> list[RolloutRequest]:
        """Every response that one rollout pass samples. Ids are unique in the run; seeds are equal for every dtype."""
        samples = self.sizes.samples_per_prompt
        first = DTYPES.index(dtype) * len(encoded) * samples
        return [
            RolloutRequest(
                sequence_id=first + index * samples + sample,
                prompt_token_ids=prompt.token_ids,
                seed=request_seed(self.config.seed, prompt.prompt_id, sample),
            )
            for index, prompt in enumerate(encoded)
            for sample in range(samples)
        ]


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A 31-bit seed that depends on the run's seed, the prompt and the sample alone, not on order or batch."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class PassEstimate:
    """One line of `--plan`: tokens of prompts and responses, and what the pass takes.

    On a GPU vLLM takes its share of the card whatever the model, so `memory_gib` is None there.
    """

    pass_id: str
    tokens: int
    memory_gib: float | None
    seconds: float


def estimate(plan: Plan) -> list[PassEstimate]:
    """Estimates every pass. Nothing is loaded: prompt lengths are guessed from characters."""
    sizes, parameters = plan.sizes, 0 if plan.model.scripted else plan.model.parameters()
    sequences = len(plan.prompts.prompts) * sizes.samples_per_prompt
    characters = sum(len(p.text or str(p.messages)) for p in plan.prompts.prompts) * sizes.samples_per_prompt
    tokens = characters // _CHARACTERS_PER_TOKEN + sequences * sizes.max_tokens
    rows = []
    for dtype in plan.config.rollout_dtypes:
        weights = parameters * _BYTES[dtype] / devices.GIB
        memory = weights + kv_cache_gib(plan) if plan.device == "cpu" else None
        rows.append(PassEstimate(rollout_pass_id(dtype), tokens, memory, _seconds(plan, dtype, parameters, tokens)))
    for trainer in plan.trainers:
        held = "float32" if trainer.mode == "autocast" else trainer.dtype
        memory = parameters * _BYTES[held] / devices.GIB + sizes.memory_budget_gib
        work = tokens * len(plan.config.rollout_dtypes)
        rows.append(PassEstimate(trainer.pass_id, work, memory, _seconds(plan, trainer.dtype, parameters, work)))
    return rows


def _seconds(plan: Plan, dtype: Dtype, parameters: int, tokens: int) -> float:
    if plan.device == "cuda":
        rate = _GPU_RATE[dtype]
    else:
        rate = _CPU_RATE[dtype][devices.cpu_has_bf16()] * devices.machine()["cores"]
    return _START_SECONDS + 2.0 * parameters * tokens / rate


def disk_gib(rows: list[PassEstimate]) -> float:
    """Disk of the tables, before compression: about 28 bytes a token row."""
    return 28 * sum(row.tokens for row in rows) / devices.GIB


def kv_cache_gib(plan: Plan) -> int:
    """KV cache for vLLM on a CPU: what the whole batch can need, between 1 and 16 GiB."""
    config = plan.model.config.get("text_config") or plan.model.config
    layers = int(config.get("num_hidden_layers", 32))
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads", 32))
    size = int(
        config.get("head_dim") or config.get("hidden_size", 4096) // max(1, int(config.get("num_attention_heads", 32)))
    )
    # Four bytes serve all three dtypes alike, so that the cache's size is the same in every pass.
    longest = (
        max((len(p.text or str(p.messages)) for p in plan.prompts.prompts), default=0) + plan.sizes.max_tokens + 128
    )
    wanted = 2 * layers * heads * size * 4 * longest * plan.sizes.rollout_batch
    return max(1, min(16, -(-wanted // devices.GIB)))


def make_plan(config: CompareConfig, progress: Progress | None = None, *, weights: bool = True) -> Plan:
    """Fills in every default.

    Args:
        config: What was asked for.
        progress: Told what takes long.
        weights: False where the plan is only to be looked at: then no weights are fetched.

    Raises:
        ProbeError: The model, the prompts or the device cannot be had.
    """
    progress = progress or Progress()
    model = resolve(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        weights=weights,
        log=progress.message,
    )
    device: devices.Device = "cpu" if model.scripted else devices.choose_device(config.device)
    defaults = devices.default_sizes(device)
    given = {f.name: value for f in fields(devices.Sizes) if (value := getattr(config, f.name)) is not None}
    sizes = replace(defaults, **given)
    prompts = load_prompts(config.prompts, None if config.num_prompts is None and config.prompts else sizes.num_prompts)
    return Plan(config, model, prompts, device, replace(sizes, num_prompts=len(prompts.prompts)))
