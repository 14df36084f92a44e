"""What a comparison is asked to do. Nothing here imports an engine, so a configuration is validated at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.types import DTYPES, Dtype, ReferenceDtype, SequenceSource, TrainerLayout, TrainerMode

_RUNS_CODE = "it runs arbitrary code in the engine"
_SECRET = "it can put a secret into the manifest, which is meant to be shared"
_OTHER_MODEL = "rollout and trainer would run different models"
_ADVICE = {
    _RUNS_CODE: "Leave it out. For code of the checkpoint use --trust-remote-code.",
    _SECRET: "Leave it out. Set a hub token as an environment variable.",
    _OTHER_MODEL: "Leave it out, or save the changed model as a separate checkpoint.",
}
# Arguments of vLLM 0.32 (engine/arg_utils.py), and fields of those that are objects, with why they are refused.
FORBIDDEN_ENGINE_ARGS = {
    "trust_remote_code": _RUNS_CODE,
    # Imported by dotted name or path, or as a plugin.
    "worker_cls": _RUNS_CODE,
    "worker_extension_cls": _RUNS_CODE,
    "scheduler_cls": _RUNS_CODE,
    "distributed_executor_backend": _RUNS_CODE,
    "logits_processors": _RUNS_CODE,
    "model_class_overrides": _RUNS_CODE,
    "io_processor_plugin": _RUNS_CODE,
    "reasoning_parser_plugin": _RUNS_CODE,
    "structured_outputs_config.reasoning_parser_plugin": _RUNS_CODE,
    "compilation_config.backend": _RUNS_CODE,
    "compilation_config.inductor_passes": _RUNS_CODE,
    "compilation_config.cache_dir": _RUNS_CODE,  # compiled code is loaded from there
    "kv_transfer_config": _RUNS_CODE,  # kv_connector_module_path
    "ec_transfer_config": _RUNS_CODE,  # ec_connector_module_path
    "ec_manager_config": _RUNS_CODE,  # encoder_cache_manager_cls
    "speculative_config": _RUNS_CODE,  # method "custom_class" imports its model; the two below are short for it
    "spec_method": _RUNS_CODE,
    "spec_model": _RUNS_CODE,
    "logging_config": _RUNS_CODE,  # logging.config.dictConfig calls any factory that its file names
    "log_config_file": _RUNS_CODE,
    "hf_token": _SECRET,
    "model_loader_extra_config": _SECRET,  # keys of an object store
    "watermark_config": _SECRET,  # the watermark's key
    "hf_overrides": _OTHER_MODEL,
    "hf_config_path": _OTHER_MODEL,
    "model_weights": _OTHER_MODEL,
    "load_format": _OTHER_MODEL,
    "weight_transfer_config": _OTHER_MODEL,
}
# What those arguments may be all the same: names that vLLM knows itself, and readers of the same safetensors files.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "distributed_executor_backend": (None, "mp", "uni", "ray"),
    "compilation_config.backend": ("", "eager", "inductor"),
    "load_format": ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
}
# These are decided by the comparison itself; a second value would contradict its manifest.
OWNED_ENGINE_ARGS = {
    "model": "--model",
    "tokenizer": "--model",
    "revision": "--revision",
    "code_revision": "--revision",
    "tokenizer_revision": "--revision",
    "dtype": "--rollout-dtypes",
    "seed": "--seed",
    "enforce_eager": "--eager",
    "max_num_seqs": "--rollout-batch",
    "logprobs_mode": "--temperature",
}
DEFAULT_MODEL = "smollm2-135m"
# Stands where a dtype would for log-probs that a file brings.
RECORDED = "recorded"
_LISTS = {"rollout_dtypes": DTYPES, "trainer_dtypes": DTYPES, "trainer_modes": get_args(TrainerMode)}
_CHOICES = {
    "trainer_layout": get_args(TrainerLayout),
    "device": ("auto", "cpu", "cuda"),
    "sequences": get_args(SequenceSource),
    "reference": get_args(ReferenceDtype),
}


@dataclass(frozen=True)
class Sizes:
    """How much a comparison samples.

    Attributes:
        num_prompts: Prompts.
        samples_per_prompt: Responses to each.
        max_tokens: Longest response.
        rollout_batch: Requests that are in the engine at once.
        self_noise_tokens: Leading tokens of the first rollout batch that are produced twice.
        memory_budget_gib: Memory that a trainer pass may use above its weights.
    """

    num_prompts: int
    samples_per_prompt: int
    max_tokens: int
    rollout_batch: int
    self_noise_tokens: int
    memory_budget_gib: float


@dataclass(frozen=True)
class Limit:
    """One `--fail-on`: `metric>value` or `metric<value`, with an optional `@rollout/trainer` (one dtype means both)."""

    text: str
    metric: str
    above: bool
    bound: float
    rollout_dtype: str | None
    trainer_dtype: str | None

    _PATTERN = re.compile(r"^\s*(\w+)\s*([<>])\s*([^@\s]+)\s*(?:@\s*(\w+)(?:/(\w+))?)?\s*$")

    @classmethod
    def parse(cls, text: str, known_metrics: Sequence[str]) -> Limit:
        """Reads one limit.

        Raises:
            UsageError: It has another form, or names an unknown metric or dtype.
        """
        match = cls._PATTERN.match(text)
        example = "Write for example --fail-on 'kl_k3>0.001@bfloat16/bfloat16'."
        if match is None:
            raise UsageError(f"--fail-on {text!r} is not of the form metric>value[@rollout/trainer].", example)
        metric, sign, number = match.groups()[:3]
        rollout, trainer = (SHORT_DTYPES.get(name, name) for name in match.groups()[3:])
        if metric not in known_metrics:
            raise UsageError(
                f"--fail-on names the unknown metric {metric!r}.", f"Known are: {', '.join(known_metrics)}."
            )
        for dtype in (rollout, trainer):
            if dtype is not None and dtype not in (*DTYPES, RECORDED):
                known = ", ".join((*DTYPES, RECORDED))
                raise UsageError(f"--fail-on names the unknown dtype {dtype!r}.", f"Known are: {known}.")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise UsageError(f"--fail-on {text!r} has no finite number.", example)
        return cls(text.strip(), metric, sign == ">", bound, rollout, trainer or rollout)

    def applies_to(self, rollout_dtype: str, trainer_dtype: str) -> bool:
        return self.rollout_dtype in (None, rollout_dtype) and self.trainer_dtype in (None, trainer_dtype)

    def exceeded_by(self, value: float) -> bool:
        return value > self.bound if self.above else value < self.bound


@dataclass(frozen=True)
class CompareConfig:
    """One comparison. Sizes left at None take the device's default (`engines.devices.default_sizes`).

    Attributes:
        model: Built-in name, local folder, or hub id. Left empty it is `DEFAULT_MODEL`, but not for recorded sequences:
            which model made them only their owner knows.
        revision: Hub revision.
        trust_remote_code: Lets the checkpoint bring Python code of its own.
        prompts: Prompt file (.jsonl, .txt), or None for the built-in set.
        chat: Renders plain prompts as one user message through the model's chat template.
        num_prompts, samples_per_prompt, max_tokens: How much is sampled.
        temperature: Sampling temperature, applied on both sides.
        source: A file of recorded sequences (`--from`), see `ingest.generic`; they are compared instead of samples.
        rescore: Scores the recorded sequences with the trainer engines although the file brings trainer log-probs.
        replay: Decodes the recorded sequences again in every rollout dtype.
        sequences: `own` lets every rollout dtype sample for itself; `shared` lets the first one sample and every other
            one decode the same ids again.
        exact_kl: Positions per rollout pass at which the two full rows of logits are compared; `"all"` for every one.
        predict_lengths: Response lengths at which ESS, weights and sequence KL are predicted; by default 2, 4 and 8
            times the observed one.
        extrapolate: Predicts beyond 8 times the observed length, too.
        reference: What passes have their errors against in the error budget: the trainer's float32, or a float64
            forward pass of its own.
        seed: Seeds every request.
        rollout_dtypes, trainer_dtypes: Rows and columns of the matrix.
        trainer_modes: `cast`, `autocast`, or both; FP32 has only `cast`.
        trainer_layout: How sequences are laid out in a trainer batch.
        trainer_attn: Attention implementation of transformers, or None for the one it chooses for the model.
        device: `auto`, `cpu`, or `cuda`.
        eager: Switches CUDA graphs and compilation of the rollout engine off.
        rollout_batch: Requests that are in the engine at once.
        self_noise_tokens: Leading tokens of the first rollout batch that are produced twice, which shows the engine's
            self-noise; 0 switches that off.
        memory_budget_gib: Memory that a trainer pass may use above its weights.
        engine_args: Passed to vLLM as they are.
    """

    model: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    prompts: str | None = None
    chat: bool = False
    num_prompts: int | None = None
    samples_per_prompt: int | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    seed: int = 0
    source: str | None = None
    rescore: bool = False
    replay: bool = False
    sequences: SequenceSource = "own"
    exact_kl: int | Literal["all"] = 0
    reference: ReferenceDtype = "float32"
    predict_lengths: tuple[int, ...] = ()
    extrapolate: bool = False
    rollout_dtypes: tuple[Dtype, ...] = DTYPES
    trainer_dtypes: tuple[Dtype, ...] = DTYPES
    trainer_modes: tuple[TrainerMode, ...] = ("cast",)
    trainer_layout: TrainerLayout = "padded"
    trainer_attn: str | None = None
    device: str = "auto"
    eager: bool = False
    rollout_batch: int | None = None
    self_noise_tokens: int | None = None
    memory_budget_gib: float | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "samples_per_prompt", "max_tokens", "rollout_batch", "memory_budget_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{flag(name)} must be positive, not {value}.", "Leave it out for the default.")
        if self.self_noise_tokens is not None and self.self_noise_tokens < 0:
            raise UsageError(
                f"--self-noise-tokens must be 0 or more, not {self.self_noise_tokens}.", "Use 0 to skip self-noise."
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(
                f"--temperature must be above 0, not {self.temperature}.",
                "Greedy decoding has no sampling distribution to compare: use --temperature 1.",
            )
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"--seed must be between 0 and 2³² − 1, not {self.seed}.", "Choose another seed.")
        if self.exact_kl != "all" and not (isinstance(self.exact_kl, int) and self.exact_kl >= 0):
            raise UsageError(
                f"--exact-kl must be a number of positions or all, not {self.exact_kl!r}.", "Use 0 for none."
            )
        check_lengths(self.predict_lengths)
        self._check_source()
        self._check_choices()
        if self.trainer_modes == ("autocast",) and self.trainer_dtypes == ("float32",):
            raise UsageError(
                "Autocast does not support float32.", "Add a 16-bit --trainer-dtypes, or use --trainer-mode cast."
            )
        self._check_engine_args()

    def _check_source(self) -> None:
        for name in ("rescore", "replay"):
            if self.source is None and getattr(self, name):
                raise UsageError(f"{flag(name)} needs recorded sequences.", "Give their file with --from.")
        if self.source is None:
            return
        for name, default in (
            ("prompts", None),
            ("chat", False),
            ("num_prompts", None),
            ("samples_per_prompt", None),
            ("max_tokens", None),
        ):
            if getattr(self, name) != default:
                raise UsageError(
                    f"{flag(name)} cannot be combined with --from.", "Leave it out: the file has prompts and responses."
                )
        if self.sequences != "own":
            raise UsageError(
                "--sequences cannot be combined with --from.", "Use --replay to decode the file's ids again."
            )

    def _check_choices(self) -> None:
        for name in _LISTS:
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{flag(name)} is empty or has a value twice.", "Give each value once.")
        for name, known in (_LISTS | _CHOICES).items():
            values = getattr(self, name) if name in _LISTS else (getattr(self, name),)
            for value in values:
                if value not in known:
                    raise UsageError(f"{flag(name)} does not accept {value!r}.", f"Known are: {', '.join(known)}.")

    def _check_engine_args(self) -> None:
        if self.exact_kl and self.engine_args.get("enable_batch_sharded_sampling"):
            raise UsageError(
                "--exact-kl needs all rows on one rank; enable_batch_sharded_sampling distributes them.",
                "Leave that --engine-arg out.",
            )
        for name, value in _with_fields(self.engine_args).items():
            reason = FORBIDDEN_ENGINE_ARGS.get(name)
            if reason is not None and value not in _HARMLESS.get(name, ()):
                raise UsageError(f"--engine-arg {name} is not allowed: {reason}.", _ADVICE[reason])
        for name in self.engine_args:
            if name in OWNED_ENGINE_ARGS:
                raise UsageError(
                    f"--engine-arg {name} conflicts with an option of mismatch-probe.",
                    f"Use {OWNED_ENGINE_ARGS[name]}.",
                )
            try:
                json.dumps(self.engine_args[name], allow_nan=False)
            except (TypeError, ValueError):
                raise UsageError(
                    f"--engine-arg {name} has a value that JSON cannot represent.",
                    "Give a finite number, a string, a list or an object.",
                ) from None

    def arguments(self) -> list[str]:
        """The options of `compare` that ask for this configuration; those at their defaults are left out."""
        return [
            word
            for one in fields(self)
            if (value := getattr(self, one.name)) not in (one.default, {})
            for word in _words_of(one.name, value)
        ]


def check_lengths(lengths: Sequence[int], option: str = "--predict-length") -> None:
    """Checks numbers of tokens.

    Raises:
        UsageError: A length is not positive.
    """
    if any(length < 1 for length in lengths):
        raise UsageError(f"{option} must be positive.", "Leave it out for the default.")


def _with_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments and, under dotted names, the fields of those that are objects."""
    fields_of = {
        f"{name}.{key}": inner
        for name, value in arguments.items()
        if isinstance(value, Mapping)
        for key, inner in value.items()
    }
    return {**arguments, **fields_of}


def _words_of(name: str, value: Any) -> list[str]:
    match value:
        case True:
            return [flag(name)]
        case Mapping():
            return [word for key, one in value.items() for word in (flag(name), f"{key}={json.dumps(one)}")]
        case tuple() if name == "predict_lengths":
            return [word for length in value for word in (flag(name), str(length))]
        case tuple():
            return [flag(name), ",".join(value)]
        case _:
            return [flag(name), str(value)]


def flag(name: str) -> str:
    """The command-line option of a field."""
    short = {
        "source": "from",
        "predict_lengths": "predict-length",
        "trainer_modes": "trainer-mode",
        "memory_budget_gib": "memory-budget",
        "engine_args": "engine-arg",
    }
    return "--" + short.get(name, name.replace("_", "-"))
