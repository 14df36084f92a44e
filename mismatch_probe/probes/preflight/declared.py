"""What the configuration declares, against what the installed engines do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from mismatch_probe.engines import registry
from mismatch_probe.engines.declarations import DECLARATIONS, known_to_transformers, known_to_vllm, rope_type
from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding, Severity

# Packages without which transformers 5.19 raises ImportError (quantizers/quantizer_*.py, `validate_environment`).
_PACKAGES = {
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum",
    "aqlm": "aqlm",
}
# What vLLM 0.32 takes from the file (config/model.py, `get_diff_sampling_param`), and transformers as well; by neutral
# values. The tool itself samples with `generation_config="vllm"`, which leaves the file alone.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "temperature": (None, 1, 1.0),
    "top_p": (None, 1, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "max_new_tokens": (None,),
}


_CODES = {"ignores": "declaration-ignored", "shifts": "declaration-shifted", "refuses": "declaration-unsupported"}


@check("dtypes")
def dtypes(subject: Subject) -> Iterator[Finding]:
    """Dtypes that the rollout engine refuses; the others still run."""
    engine, config = registry.find(subject.use.rollout_engine), subject.model.config
    refused = {dtype: why for dtype in subject.use.rollout_dtypes if (why := engine.why_no_dtype(config, dtype))}
    severity: Severity = "fail" if len(refused) == len(subject.use.rollout_dtypes) else "warn"
    for dtype, why in refused.items():
        yield found("dtype-unsupported", severity, dtype, why=why)


@check("architecture")
def architecture(subject: Subject) -> Iterator[Finding]:
    """Architectures that an installed engine does not know, and code that the checkpoint brings."""
    config, custom = subject.model.config, subject.model.config.get("auto_map")
    vllm = known_to_vllm() if "vllm" in subject.packages else None
    transformers = known_to_transformers() if "transformers" in subject.packages else None
    kind, names = str(config.get("model_type") or ""), tuple(config.get("architectures") or ())
    native = transformers is None or kind in transformers.names
    if custom and not native and not subject.use.trust_remote_code:
        yield found("code-needed", "fail", kind)
    elif custom:
        used = subject.use.trust_remote_code
        yield found("code-used" if used else "code-unused", "warn" if used else "info", kind)
    elif not native:
        yield found("architecture-unknown", "fail", kind, engine="transformers")
    if native and vllm is not None and names and not any(name in vllm.names - vllm.borrowed for name in names):
        # vLLM runs what it has not implemented by transformers' own code (models/registry.py, module "transformers").
        yield found("architecture-by-transformers", "info", names[0])


@check("rope")
def rope(subject: Subject) -> Iterator[Finding]:
    """A kind of RoPE scaling that an engine does not know."""
    kind = rope_type(subject.config)
    if subject.model.config.get("auto_map") or kind == "default":
        return
    for engine, known in (("vLLM", known_to_vllm()), ("transformers", known_to_transformers())):
        if engine.lower() in subject.packages and known is not None and kind not in known.rope_types:
            yield found("rope-unknown", "fail", kind, engine=engine)


@check("declarations")
def declarations(subject: Subject) -> Iterator[Finding]:
    """Declarations that one engine ignores, shifts or refuses; see `engines.declarations`."""
    config, tensors = subject.config, subject.checkpoint.tensors
    for one in DECLARATIONS:
        if subject.model_type not in one.model_types or not one.applies(config):
            continue
        if one.side.lower() not in subject.packages:
            continue
        if one.attention and subject.use.attention not in one.attention:
            continue
        untied = one.key == "tie_word_embeddings" and one.does == "ignores"
        if untied and (not subject.has("tensors") or "lm_head.weight" in tensors):
            continue
        severity: Severity = "fail" if untied or one.does == "refuses" else "warn"
        limit = config.get(one.beyond) if one.beyond else None
        if limit is not None and not subject.exceeds(limit):
            severity = "info"
        values = {"engine": one.side, "value": _shown(config.get(one.key)), "file": one.evidence[0].file}
        yield found(_CODES[one.does], severity, one.key, versions=one.versions, beyond=limit, **values)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


@check("quantisation")
def quantisation(subject: Subject) -> Iterator[Finding]:
    """A checkpoint that is quantised: the trainer's side needs a package, and compares what it unpacks."""
    if not subject.quantisation:
        return
    method = str(subject.quantisation.get("quant_method") or "unknown")
    package = _PACKAGES.get(method, "")
    lacking = bool(package) and find_spec(package) is None
    code = "quantised-package-missing" if lacking else "weights-quantised"
    yield found(code, "fail" if lacking else "warn", method, package=package)


@check("generation-config")
def generation_config(subject: Subject) -> Iterator[Finding]:
    """Values that change sampling in a job which reads `generation_config.json`, as vLLM and transformers do."""
    written = subject.checkpoint.generation
    changed = {key: float(written[key]) for key, neutral in _NEUTRAL.items() if _changes(written.get(key), neutral)}
    if changed:
        yield found("sampling-changed", "warn", "generation_config.json", **changed)
    stops, own = _ids(written.get("eos_token_id")), _ids(subject.config.get("eos_token_id"))
    if stops - own and own:
        ids = ", ".join(map(str, sorted(stops - own)))
        yield found("stops-added", "info", "generation_config.json", ids=ids)


def _changes(value: object, neutral: tuple[object, ...]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value not in neutral


def _ids(value: object) -> set[int]:
    listed = value if isinstance(value, list) else [value]
    return {one for one in listed if isinstance(one, int)}
