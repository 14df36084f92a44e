"""What a comparison will run: passes, sequences, and a rough estimate of time, memory and disk. Runs nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mismatch_probe.config import DEFAULT_MODEL, CompareConfig, Sizes
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.rows import file_bytes
from mismatch_probe.errors import ModelError, UsageError
from mismatch_probe.ingest.recording import Recording
from mismatch_probe.passes import PassId
from mismatch_probe.probes.preflight import Use
from mismatch_probe.probes.preflight.run import guard, preflight
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.recorded import check_recorded, open_recording
from mismatch_probe.prompts import PromptSet, load_prompts
from mismatch_probe.results.finding import Finding
from mismatch_probe.runs.folder import run_folder
from mismatch_probe.runs.passes import Passes, passes_of
from mismatch_probe.types import DTYPES, EncodedPrompt, RolloutRequest

# Sustained FLOP/s of matrix products: per CPU core as measured on 2-core machines without and with BF16 instructions,
# assumed for a GPU. Good to a factor of two or three, which is what an estimate beforehand needs.
_CPU_RATE = {"bfloat16": (5e9, 100e9), "float16": (6e9, 14e9), "float32": (30e9, 56e9), "float64": (15e9, 28e9)}
_GPU_RATE = {"bfloat16": 1e14, "float16": 1e14, "float32": 1.5e13, "float64": 1e12}
_START_SECONDS = 15.0
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Plan:
    """A comparison with every default filled in."""

    config: CompareConfig
    model: ModelRef
    prompts: PromptSet
    device: devices.Device
    sizes: Sizes
    passes: Passes
    recorded: Recording | None = None

    def engine(self, wanted: PassId) -> registry.Engine:
        """What runs a pass."""
        return registry.find("scripted" if self.model.scripted else wanted.engine)

    def requests(self, dtype: str, encoded: list[EncodedPrompt]) -> list[RolloutRequest]:
        """Every response that one rollout pass samples. Ids are unique in the run; seeds are equal for every dtype."""
        samples = self.sizes.samples_per_prompt
        first = list(DTYPES).index(dtype) * len(encoded) * samples  # type: ignore[arg-type]
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

    pass_id: PassId
    tokens: int
    memory_gib: float | None
    seconds: float


def estimate(plan: Plan) -> list[PassEstimate]:
    """Estimates every pass. Nothing is loaded: prompt lengths are guessed from characters."""
    sizes, rows = plan.sizes, []
    parameters = 0 if plan.model.scripted or not plan.model.config else plan.model.parameters()
    if plan.recorded is not None:
        tokens = plan.recorded.recorded.file.n_prompt_tokens + plan.recorded.recorded.file.n_tokens
    else:
        characters = sum(len(p.text or str(p.messages)) for p in plan.prompts.prompts)
        each = characters // _CHARACTERS_PER_TOKEN + len(plan.prompts.prompts) * sizes.max_tokens
        tokens = each * sizes.samples_per_prompt
    engines = [rollout for rollout in plan.passes.rollouts if not rollout.recorded]
    for rollout in engines:
        weights = parameters * DTYPE_INFOS[rollout.dtype].bytes / devices.GIB
        memory = weights + kv_cache_gib(plan) if plan.device == "cpu" else None
        rows.append(PassEstimate(rollout, tokens, memory, _seconds(plan, rollout.dtype, parameters, tokens)))
    for trainer in plan.passes.scored:
        held = "float32" if trainer.mode == "autocast" else trainer.dtype
        memory = parameters * DTYPE_INFOS[held].bytes / devices.GIB + sizes.memory_budget_gib
        work = tokens * (1 if plan.passes.source else len(engines))
        rows.append(PassEstimate(trainer, work, memory, _seconds(plan, trainer.dtype, parameters, work)))
    return rows


def _seconds(plan: Plan, dtype: str, parameters: int, tokens: int) -> float:
    if plan.device == "cuda":
        rate = _GPU_RATE[dtype]
    else:
        rate = _CPU_RATE[dtype][devices.cpu_has_bf16()] * (devices.machine().cores or 1)
    return _START_SECONDS + 2.0 * parameters * tokens / rate


def disk_gib(plan: Plan, rows: list[PassEstimate]) -> float:
    """Disk of the tables, before compression (about 36 bytes a token row), and of the rows of logits that are kept."""
    engines = [row for row in rows if row.pass_id.side == "rollout"]
    kept = 0
    for row in engines if plan.config.exact_kl else ():
        most = row.tokens if plan.config.exact_kl == "all" else min(row.tokens, int(plan.config.exact_kl))
        kept += file_bytes(most, int(plan.model.text_config.get("vocab_size", 0)))
    return (36 * sum(row.tokens for row in rows) + kept) / devices.GIB


def kv_cache_gib(plan: Plan) -> int:
    """KV cache on a CPU: what the whole batch can need, between 1 and 16 GiB."""
    config = plan.model.text_config
    layers = int(config.get("num_hidden_layers", 32))
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads", 32))
    size = int(
        config.get("head_dim") or config.get("hidden_size", 4096) // max(1, int(config.get("num_attention_heads", 32)))
    )
    # Four bytes serve all three dtypes alike, so that the cache's size is the same in every pass.
    prompt = max((len(p.text or str(p.messages)) for p in plan.prompts.prompts), default=0)
    if plan.recorded is not None:
        prompt = plan.recorded.recorded.file.longest_prompt
    longest = prompt + plan.sizes.max_tokens + 128
    wanted = 2 * layers * heads * size * 4 * longest * plan.sizes.rollout_batch
    return max(1, min(16, -(-wanted // devices.GIB)))


def _check_engines(config: CompareConfig, passes: Passes) -> None:
    """Refuses options of recorded sequences that ask for an engine which does not run."""
    if config.source is None:
        return
    if config.exact_kl and not config.replay:
        raise UsageError("--exact-kl needs rows of logits, and a file brings none.", "Add --replay.")
    if not passes.scored and (config.reference == "float64" or (config.temperature != 1 and not config.replay)):
        name = "--reference float64" if config.reference == "float64" else "--temperature"
        raise UsageError(f"{name} needs a trainer engine, and the file brings both sides.", "Add --rescore.")


def _other_columns(recorded: Recording | None) -> str:
    """Where log-probs may lie under another name, how to say so."""
    ignored = () if recorded is None else recorded.recorded.file.ignored_columns
    return f", or name their column with --map: not read are {', '.join(ignored)}" if ignored else ""


def make_plan(
    config: CompareConfig,
    progress: Progress | None = None,
    out: str | Path | None = None,
    *,
    weights: bool = True,
) -> Plan:
    """Fills in every default.

    Args:
        config: What was asked for.
        progress: Told what takes long.
        out: Folder of the run; None for one under `runs/`.
        weights: False where the plan is only to be looked at: then no weights are fetched.

    Raises:
        ProbeError: The model, the prompts or the device cannot be had.
    """
    progress = progress or Progress()
    recorded = open_recording(config, out, progress)
    passes = passes_of(config, None if recorded is None else recorded.recorded)
    rollout_engine = registry.find(config.rollout_engine, "rollout")
    trainer_engine = registry.find(config.trainer_engine, "trainer")
    if not passes.rollouts:
        raise UsageError(
            f"{config.source} holds no rollout_logprobs, so there is nothing to compare a trainer with.",
            f"Add --replay to decode its ids with a rollout engine{_other_columns(recorded)}.",
        )
    _check_engines(config, passes)
    if passes.scored or any(not rollout.recorded for rollout in passes.rollouts):
        if recorded is not None and not config.model:
            raise UsageError(
                "Scoring or replaying recorded sequences needs the model that sampled them.", "Name it with --model."
            )
        config = config.replace(model=config.model or DEFAULT_MODEL)
        model = resolve(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            weights=weights,
            log=progress.message,
        )
        samples = any(not rollout.recorded for rollout in passes.rollouts)
        engine = rollout_engine if samples else trainer_engine
        device: devices.Device = registry.find("scripted" if model.scripted else engine.name).choose_device(
            config.device
        )
    else:
        model, device = ModelRef.none(), "cpu"
    replays = any(rollout.kind == "replay" for rollout in passes.rollouts)
    if replays and not model.scripted and (why := rollout_engine.why_no_replay(device, config.temperature)):
        raise UsageError(why, "Leave --temperature out.")
    if config.engine_args and not model.scripted and (why := rollout_engine.why_no_settings(config.engine_args)):
        raise UsageError(f"--engine-arg cannot be used: {why}.", "Leave it out.")
    given = {f.name: value for f in fields(Sizes) if (value := getattr(config, f.name)) is not None}
    sizes = replace(devices.default_sizes(device), **given)
    if recorded is not None:
        check_recorded(recorded, model)
        facts = recorded.recorded.file
        prompts = PromptSet((), facts.path, facts.sha256)
        sizes = replace(sizes, num_prompts=facts.n_prompts, samples_per_prompt=1, max_tokens=facts.longest_response)
    else:
        whole = config.num_prompts is None and config.prompts
        prompts = load_prompts(config.prompts, None if whole else sizes.num_prompts)
        sizes = replace(sizes, num_prompts=len(prompts.prompts))
    plan = Plan(config, model, prompts, device, sizes, passes, recorded)
    if weights and model.config and not model.scripted:
        guard(model, _use(plan, out), progress)
    return plan


def plan_preflight(plan: Plan, out: str | Path | None = None) -> tuple[Finding, ...]:
    """What of a plan will fail or surprise; nothing where its model is not on this disk.

    Args:
        plan: The plan.
        out: Folder of the run; None for one under `runs/`.
    """
    model = plan.model
    if not model.config or model.scripted or model.known_parameters is not None:
        return ()
    return tuple(preflight(model, _use(plan, out)).of("fail", "warn", "note"))


def _use(plan: Plan, out: str | Path | None) -> Use:
    """What the comparison does with its checkpoint."""
    config, engines = plan.config, [one for one in plan.passes.rollouts if not one.recorded]
    held = [one.dtype for one in engines]
    held += ["float32" if one.mode == "autocast" else one.dtype for one in plan.passes.scored]
    try:
        disk = disk_gib(plan, estimate(plan))
    except ModelError:  # the files are not whole, which is what is about to be said
        disk = 0.0
    return Use(
        rollout_dtypes=tuple(one.dtype for one in engines),
        attention=config.trainer_attn,
        trust_remote_code=config.trust_remote_code,
        chat=config.chat,
        prompts=plan.prompts.prompts,
        max_tokens=plan.sizes.max_tokens,
        device=plan.device,
        rollout_engine=config.rollout_engine,
        trainer_engine=config.trainer_engine,
        bytes_per_weight=max((DTYPE_INFOS[dtype].bytes for dtype in held), default=0),
        disk_bytes=int(disk * devices.GIB),
        folder=run_folder(out),
    )
