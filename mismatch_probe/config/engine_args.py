"""Arguments that are passed to vLLM as they are, and those that are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mismatch_probe.errors import UsageError

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


def engine_args_of(given: Any) -> Any:
    """Texts `name=value` as a mapping; the value is read as JSON where it is JSON. Anything else as it is."""
    return dict(_engine_arg(text) for text in given) if isinstance(given, list | tuple) else given


def _engine_arg(text: Any) -> tuple[str, Any]:
    name, equals, value = str(text).partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(
            f"--engine-arg {text!r} is not of the form name=value.", "Example: --engine-arg block_size=32."
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def check_engine_args(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the arguments.

    Raises:
        UsageError: One of them is not allowed, contradicts an option, or has a value that JSON cannot represent.
    """
    for name, value in _with_fields(arguments).items():
        reason = FORBIDDEN_ENGINE_ARGS.get(name)
        if reason is not None and value not in _HARMLESS.get(name, ()):
            raise UsageError(f"--engine-arg {name} is not allowed: {reason}.", _ADVICE[reason])
    for name, value in arguments.items():
        if name in OWNED_ENGINE_ARGS:
            raise UsageError(
                f"--engine-arg {name} conflicts with an option of mismatch-probe.", f"Use {OWNED_ENGINE_ARGS[name]}."
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise UsageError(
                f"--engine-arg {name} has a value that JSON cannot represent.",
                "Give a finite number, a string, a list or an object.",
            ) from None
    return arguments


def _with_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments and, under dotted names, the fields of those that are objects."""
    fields_of = {
        f"{name}.{key}": inner
        for name, value in arguments.items()
        if isinstance(value, Mapping)
        for key, inner in value.items()
    }
    return {**arguments, **fields_of}
