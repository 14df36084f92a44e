"""Are the files there and whole, and would both engines read the same ones?"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from mismatch_probe.engines.checkpoint import has_tokenizer
from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding, Severity

_OTHER_WEIGHTS = (".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt")


@check("weights")
def weights(subject: Subject) -> Iterator[Finding]:
    """Files of weights: missing, truncated, longer than their header says, or something else by that name."""
    checkpoint = subject.checkpoint
    if not checkpoint.files:
        others = tuple(sorted(f.name for f in checkpoint.folder.iterdir() if f.suffix in _OTHER_WEIGHTS))
        yield found("weights-none", "fail", str(checkpoint.folder), others=others)
        return
    missing = tuple(file.name for file in checkpoint.files if file.problem == "missing")
    if missing:
        yield found("weights-missing", "fail", missing[0], missing=missing, files=len(checkpoint.files))
    for file in checkpoint.files:
        if file.problem == "truncated":
            yield found("weights-truncated", "fail", file.name, bytes=file.size, wanted=file.wanted)
        elif file.problem not in ("", "missing"):
            values = {"bytes": file.size, "wanted": file.wanted}
            yield found("weights-damaged", "fail", file.name, problem=file.problem, **values)
    if checkpoint.format == "bin":
        yield found("weights-pickled", "info", files=len(checkpoint.files))


@check("small-files")
def small_files(subject: Subject) -> Iterator[Finding]:
    """JSON files that cannot be read, and a tokenizer that is not there."""
    for name, why in subject.checkpoint.unreadable.items():
        yield found("file-unreadable", "fail", name, why=why)
    if not has_tokenizer(subject.checkpoint.folder):
        yield found("tokenizer-none", "fail", str(subject.checkpoint.folder))


@check("index", needs=("weights",))
def index(subject: Subject) -> Iterator[Finding]:
    """The index against the headers."""
    checkpoint = subject.checkpoint
    if checkpoint.index is None or checkpoint.both or not checkpoint.complete or not checkpoint.tensors:
        return
    absent = tuple(name for name in checkpoint.index if name not in checkpoint.tensors)
    if absent:
        file = checkpoint.index[absent[0]]
        yield found("index-absent", "fail", absent[0], tensors=len(absent), file=file)
    moved = [n for n, f in checkpoint.index.items() if n not in absent and checkpoint.tensors[n].file != f]
    unlisted = [name for name in checkpoint.tensors if name not in checkpoint.index]
    for code, names in (("index-moved", moved), ("index-unlisted", unlisted)):
        if names:
            yield found(code, "warn", names[0], tensors=len(names), file=checkpoint.tensors[names[0]].file)


@check("which-files", needs=("weights",))
def which_files(subject: Subject) -> Iterator[Finding]:
    """Would both engines read the same files? Sources in `engines.checkpoint`."""
    checkpoint = subject.checkpoint
    single = len(checkpoint.files) == 1 and checkpoint.files[0].name in ("model.safetensors", "pytorch_model.bin")
    if checkpoint.both:
        yield found("files-two-checkpoints", "fail", checkpoint.files[0].name)
    elif checkpoint.index is None and not single:
        names = tuple(file.name for file in checkpoint.files)
        yield found("files-no-index", "fail", names[0], files=names)
    elif checkpoint.extra:
        original = tuple(name for name in checkpoint.extra if name.startswith("consolidated"))
        severity: Severity = "info"
        if original:
            severity = "warn"  # vLLM's load format "auto" takes these where they are
        elif checkpoint.index is None:
            severity = "fail"
        yield found("files-extra", severity, checkpoint.extra[0], files=checkpoint.extra)
    if checkpoint.adapter is not None:
        # transformers loads it onto the model if peft is there; vLLM meets its tensors where no index leaves them out.
        harmless = checkpoint.index is not None and find_spec("peft") is None
        base = str(checkpoint.adapter.get("base_model_name_or_path") or "")
        severity = "warn" if harmless else "fail"
        yield found("files-adapter", severity, "adapter_config.json", base=base)
