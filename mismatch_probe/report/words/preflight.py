"""Words of `preflight`."""

from __future__ import annotations

from mismatch_probe.report.format import clipped, size
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding

_AGAIN = "Copy or download the file again."
_SAVE = "Save the whole model with model.save_pretrained(folder)."
_TENSORS = {"tensors": "how many", "file": "file of the first one"}
_PROBLEMS = {
    "longer": "is longer than its header says",
    "malformed": "has no valid safetensors header",
    "lfs-pointer": "is a Git LFS pointer, not the file itself",
}


def _others(finding: Finding) -> str:
    more = finding.whole("tensors") - 1
    return f" and {more:,} more" if more else ""


@words(
    "weights-none",
    "The folder has no weights that both engines load.",
    {"others": "files of weights in other formats"},
    "Save the model as safetensors: model.save_pretrained(folder).",
)
def _none(finding: Finding) -> str:
    others = finding.names("others")
    only = f", only {clipped(', '.join(others), 80)}" if others else ""
    return f"{finding.where} has no weights that both engines load{only}."


@words(
    "weights-missing",
    "Files that the index names are missing.",
    {"missing": "the missing files", "files": "files that the index names"},
    "Download the missing files, or copy the whole folder.",
)
def _missing(finding: Finding) -> str:
    missing = finding.names("missing")
    return f"{len(missing)} of {finding.number('files'):,.0f} weight files are missing, first {missing[0]}."


@words(
    "weights-truncated",
    "A file of weights is shorter than its header says.",
    {"bytes": "size of the file", "wanted": "size by its header, None where the header is cut"},
    _AGAIN,
)
def _truncated(finding: Finding) -> str:
    wanted = finding.maybe("wanted")
    whole = f" of {wanted:,.0f}" if wanted else ""
    return f"{finding.where} is truncated: it has {finding.number('bytes'):,.0f}{whole} bytes."


@words(
    "weights-damaged",
    "A file of weights is something else than its name says.",
    {"problem": "longer, malformed, or lfs-pointer", "bytes": "size of the file", "wanted": "size by its header"},
    f"{_AGAIN} For a Git LFS pointer, run `git lfs pull`.",
)
def _damaged(finding: Finding) -> str:
    return f"{finding.where} {_PROBLEMS.get(finding.text('problem'), 'cannot be read')}."


@words(
    "weights-pickled",
    "The weights are pickles. Both engines load them with `weights_only=True`, which runs no code.",
    {"files": "how many files"},
    "Save them as safetensors to have names and shapes checked, too.",
)
def _pickled(finding: Finding) -> str:
    return "The weights are .bin files: both engines load them without running code; shapes are not checked here."


@words("file-unreadable", "A JSON file of the folder cannot be read.", {"why": "the reason"}, "Restore the file.")
def _unreadable(finding: Finding) -> str:
    return f"{finding.where} cannot be read ({clipped(finding.text('why'), 120)})."


@words(
    "tokenizer-none",
    "The folder has no tokenizer.",
    fix="Save the tokenizer beside the weights: tokenizer.save_pretrained(folder).",
)
def _no_tokenizer(finding: Finding) -> str:
    return f"{finding.where} has no tokenizer."


@words("index-absent", "The index names tensors that no file has.", _TENSORS, _SAVE)
def _absent(finding: Finding) -> str:
    return f"The index names {finding.where}{_others(finding)} in {finding.text('file')}, which does not have it."


@words("index-moved", "The index names another file for a tensor than the one that has it.", _TENSORS, _SAVE)
def _moved(finding: Finding) -> str:
    return f"{finding.where}{_others(finding)} lies in {finding.text('file')}; the index names another file."


@words("index-unlisted", "Files have tensors that the index does not name.", _TENSORS, _SAVE)
def _unlisted(finding: Finding) -> str:
    return f"{finding.text('file')} has {finding.where}{_others(finding)}, which the index does not name."


@words(
    "files-two-checkpoints",
    "The folder has a single file of weights beside an index of others: transformers loads the one, vLLM the others.",
    fix="Move one of the two out of the folder.",
)
def _two(finding: Finding) -> str:
    return f"The folder has two sets of weights: transformers loads {finding.where}, vLLM the files of the index."


@words(
    "files-no-index",
    "Several files of weights have no index, without which transformers does not load them.",
    {"files": "the files"},
    "Add model.safetensors.index.json; save_pretrained writes it.",
)
def _no_index(finding: Finding) -> str:
    files = finding.names("files")
    return f"transformers does not load {clipped(', '.join(files), 100)}: they have no index."


@words(
    "files-extra",
    "The folder has files of weights that only one engine reads.",
    {"files": "the files"},
    "Move the extra files out of the folder.",
)
def _extra(finding: Finding) -> str:
    files = clipped(", ".join(finding.names("files")), 100)
    if finding.severity == "info":
        return f"No engine reads {files}: the index does not name it."
    return f"The engines read different files: vLLM reads {files}, transformers does not."


@words(
    "files-adapter",
    "The folder has a PEFT adapter beside the weights: transformers loads it where peft is installed, vLLM does not.",
    {"base": "base model that the adapter names"},
    "Move the adapter's files out of the folder, or merge the adapter: merge_and_unload(), save_pretrained(folder).",
)
def _adapter(finding: Finding) -> str:
    base = f" of {finding.text('base')}" if finding.text("base") else ""
    return f"The folder has a PEFT adapter{base} beside the weights, so the two engines would be different models."


@words(
    "shape-differs",
    "A tensor has another shape than the configuration says.",
    {"found": "by the header", "wanted": "by config.json", "file": "its file", "tensors": "how many differ"},
    "Take config.json and weights from the same save.",
)
def _shape(finding: Finding) -> str:
    found, wanted = finding.text("found"), finding.text("wanted")
    return f"{finding.where}{_others(finding)} has shape {found} in the file and {wanted} by config.json."


@words(
    "layers-missing",
    "The files have fewer layers than the configuration declares.",
    {"missing": "how many", "first": "index of the first one", "declared": "layers by config.json"},
    "Take config.json and weights from the same save.",
)
def _layers(finding: Finding) -> str:
    counts = f"{finding.number('missing'):,.0f} of {finding.number('declared'):,.0f}"
    return f"Layers are missing: {counts}, first layer {finding.number('first'):.0f}."


@words(
    "layers-unused",
    "The files have layers that the configuration does not count.",
    {"layers": "how many", "declared": "layers by config.json"},
    "Take config.json and weights from the same save.",
)
def _more_layers(finding: Finding) -> str:
    more, declared = finding.number("layers"), finding.number("declared")
    return f"The files have {more:,.0f} more layers than the {declared:,.0f} of config.json; no engine loads them."


@words("tensors-missing", "Tensors are missing.", {"tensors": "how many"}, _SAVE)
def _tensors_missing(finding: Finding) -> str:
    return f"The files do not have {finding.where}{_others(finding)}."


@words(
    "tensors-unused",
    "Tensors that neither engine loads: transformers drops them, vLLM may stop.",
    _TENSORS,
    "Remove them: load the model and save it again with save_pretrained.",
)
def _unused(finding: Finding) -> str:
    return f"Neither engine has a place for {finding.where}{_others(finding)} of {finding.text('file')}."


@words(
    "head-tied-and-stored",
    "The configuration ties embedding and head, and the file has a head of its own. The installed engines keep a head "
    "that differs; other versions and trainers discard it.",
    {"file": "file of the head"},
    "Set tie_word_embeddings to false in config.json if the head differs, or remove the head if it does not.",
)
def _tied(finding: Finding) -> str:
    return f"config.json ties embedding and head, and {finding.text('file')} has {finding.where} of its own."


@words(
    "vocabulary-too-small",
    "The tokenizer has ids that the embedding has no row for.",
    {"largest_id": "largest id of the tokenizer", "rows": "rows of the embedding by config.json"},
    "Use the model's own tokenizer, or resize the embedding: resize_token_embeddings.",
)
def _vocabulary(finding: Finding) -> str:
    largest, rows = finding.number("largest_id"), finding.number("rows")
    return f"The tokenizer has ids up to {largest:,.0f}, and the embedding has {rows:,.0f} rows."


@words(
    "chat-template-none",
    "Prompts are chats, and the tokenizer has no chat template.",
    {"prompts": "how many prompts are chats"},
    "Use an instruct model, or plain-text prompts without --chat.",
)
def _template(finding: Finding) -> str:
    count, first = finding.number("prompts"), f" ({finding.number('prompts'):,.0f} prompts, first {finding.where})"
    return f"Prompts are chats{first if count else ''}, and the tokenizer has no chat template."


@words(
    "prompt-too-long",
    "A prompt fills the model's context.",
    {"tokens": "of the longest prompt", "context": "of the model, in tokens", "prompts": "how many are too long"},
    "Shorten or remove the prompt.",
)
def _prompt(finding: Finding) -> str:
    tokens, context = finding.number("tokens"), finding.number("context")
    return f"Prompt {finding.where} has {tokens:,.0f} tokens; the model's context is {context:,.0f}."


@words(
    "responses-cut",
    "Prompt and longest response together exceed the model's context, so responses end there.",
    {"max_tokens": "longest response", "context": "of the model", "longest": "longest prompt; all in tokens"},
    "Lower --max-tokens.",
)
def _cut(finding: Finding) -> str:
    longest = finding.maybe("longest")
    prompt = f" after a prompt of {longest:,.0f}" if longest else ""
    return (
        f"Responses of {finding.number('max_tokens'):,.0f} tokens{prompt} exceed the context of "
        f"{finding.number('context'):,.0f} and end there."
    )


@words(
    "dtype-unsupported",
    "The rollout engine does not support a dtype for this model.",
    {"why": "its reason"},
    "Leave this dtype out.",
)
def _dtype(finding: Finding) -> str:
    return finding.text("why")


@words(
    "code-needed",
    "The checkpoint needs its own Python code, which has not been allowed to run.",
    fix="Read that code, then add --trust-remote-code.",
)
def _code(finding: Finding) -> str:
    return f"transformers does not know model type {finding.where or 'none'}; the checkpoint brings code for it."


@words("code-used", "Code of the checkpoint runs on both sides.", fix="Read that code before you run it.")
def _code_used(finding: Finding) -> str:
    return "Python code of the checkpoint runs in both engines."


@words("code-unused", "The checkpoint brings code that does not run.")
def _code_unused(finding: Finding) -> str:
    return f"The checkpoint brings Python code; the engines' own {finding.where} is used instead."


@words(
    "architecture-unknown",
    "An engine does not know the model type.",
    {"engine": "which engine"},
    "Use a model that both engines support, or newer versions; `mismatch-probe env` lists what is installed.",
)
def _architecture(finding: Finding) -> str:
    return f"The installed {finding.text('engine')} does not know model type {finding.where or 'none'}."


@words(
    "architecture-by-transformers",
    "vLLM has no implementation of its own and runs that of transformers: two schedules of one code are compared.",
)
def _backend(finding: Finding) -> str:
    return f"vLLM has no {finding.where} of its own and runs that of transformers."


@words(
    "rope-unknown",
    "An engine does not know the kind of RoPE scaling.",
    {"engine": "which engine"},
    "Use a version of the engine that knows it.",
)
def _rope(finding: Finding) -> str:
    return f"The installed {finding.text('engine')} does not know RoPE scaling of type {finding.where}."


_DECLARED = {
    "engine": "which engine",
    "value": "in config.json",
    "file": "where it was read",
    "versions": "the versions it was read in",
    "beyond": "tokens of a sequence beyond which it matters, None where it always does",
}


def _beyond(finding: Finding) -> str:
    beyond = finding.maybe("beyond")
    return f" It matters in sequences beyond {beyond:,.0f} tokens." if beyond else ""


@words(
    "declaration-ignored",
    "One engine follows a declaration of config.json and the other ignores it.",
    _DECLARED,
    "Expect a gap that no precision explains, or use versions that agree. For a soft cap, use --trainer-attn eager.",
)
def _ignored(finding: Finding) -> str:
    return (
        f"{finding.text('engine')} ignores {finding.where} {finding.text('value')} ({finding.text('file')})."
        f"{_beyond(finding)}"
    )


@words(
    "declaration-shifted",
    "One engine reads a declaration of config.json in its own way.",
    _DECLARED,
    "Expect a gap that no precision explains in longer sequences.",
)
def _shifted(finding: Finding) -> str:
    return (
        f"{finding.text('engine')} reads {finding.where} {finding.text('value')} in its own way "
        f"({finding.text('file')}).{_beyond(finding)}"
    )


@words(
    "declaration-unsupported",
    "vLLM does not support a declaration of config.json and stops.",
    _DECLARED,
    "Change the declaration if the model allows it, or use another model.",
)
def _refused(finding: Finding) -> str:
    return f"{finding.text('engine')} does not run {finding.where} {finding.text('value')} ({finding.text('file')})."


@words(
    "weights-quantised",
    "The checkpoint is quantised: both engines unpack it in their own way, and dtypes apply to what is not quantised.",
    {"package": "that transformers needs for it, empty for none that is known"},
    "Compare the unquantised model to see what precision alone does.",
)
def _quantised(finding: Finding) -> str:
    return f"The checkpoint is quantised ({finding.where}); each engine unpacks it in its own way."


@words(
    "quantised-package-missing",
    "transformers needs a package for this quantisation, and it is not installed.",
    {"package": "which one"},
    "Install the package, or use the unquantised model.",
)
def _package(finding: Finding) -> str:
    return f"transformers needs the package {finding.text('package')} for {finding.where} weights; it is not installed."


@words(
    "sampling-changed",
    "`generation_config.json` has values that change sampling in a job that reads it. This tool does not use them.",
    fix='Set sampling parameters explicitly in your own job, or load with generation_config="vllm".',
)
def _sampling(finding: Finding) -> str:
    changed = ", ".join(f"{key} {finding.number(key):g}" for key in finding.values)
    return f"{finding.where} sets {changed}: your own job samples with it unless it sets its own; this tool does not."


@words(
    "stops-added",
    "`generation_config.json` has stop ids that config.json does not have.",
    {"ids": "the ids"},
    "Check that your own job stops at the same ids.",
)
def _stops(finding: Finding) -> str:
    return f"{finding.where} stops at further ids: {finding.text('ids')}."


@words(
    "memory-short",
    "The weights of a pass need more memory than is free.",
    {
        "needed": "of the largest pass, in bytes",
        "total": "of the machine or its largest GPU, in bytes",
        "free": "now, in bytes",
    },
    "Free memory, use a machine with more, or leave wide dtypes out.",
)
def _memory(finding: Finding) -> str:
    needed, free = (size(finding.number(key)) for key in ("needed", "free"))
    return f"The weights of the largest pass need {needed}; {free} of {size(finding.number('total'))} is free."


@words(
    "disk-short",
    "The run writes more than the disk has free.",
    {"needed": "what the run writes, in bytes", "free": "what is free, in bytes"},
    "Free space, choose another --out, or use smaller sizes.",
)
def _disk(finding: Finding) -> str:
    needed, free = (size(finding.number(key)) for key in ("needed", "free"))
    return f"The run writes up to {needed}; {free} is free in {finding.where}."
