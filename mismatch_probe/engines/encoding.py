"""From prompts to ids, once, with the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from mismatch_probe.engines import faults
from mismatch_probe.engines.base import LESS_OR_MORE, Channel
from mismatch_probe.engines.checkpoint import read_config
from mismatch_probe.engines.events import Encoded
from mismatch_probe.engines.scripted import encode_scripted
from mismatch_probe.errors import ModelError, PromptError
from mismatch_probe.types import EncodedPrompt, Prompt


@dataclass(frozen=True)
class EncodeJob:
    """Encode prompts once, with the model's own tokenizer and chat template; decode ids that somebody else made."""

    model_path: str
    prompts: Sequence[Prompt]
    chat: bool
    trust_remote_code: bool
    token_ids: Sequence[int] = ()
    subject: ClassVar[str] = "The tokenizer"
    memory_advice: ClassVar[str] = LESS_OR_MORE

    def run(self, channel: Channel) -> None:
        """Sends `Encoded`."""
        try:
            channel.send(encode(self))
        except Exception as error:
            its_own = isinstance(error, OSError) or "tokenizer" in str(error).lower()
            if its_own and faults.classify(error, self) is None:
                raise ModelError(
                    f"The tokenizer of {self.model_path} cannot be loaded: {faults.first_line(error)}",
                    "Save the tokenizer beside the weights: tokenizer.save_pretrained(folder).",
                ) from error
            raise


def encode(job: EncodeJob) -> Encoded:
    """Encodes every prompt and decodes every id.

    Raises:
        ModelError: Chat messages are given and the tokenizer has no chat template.
        PromptError: A prompt has no tokens.
    """
    if read_config(job.model_path).get("model_type") == "scripted":
        return encode_scripted(job.prompts, job.token_ids)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        job.model_path, trust_remote_code=job.trust_remote_code, local_files_only=True
    )

    def encoded(prompt: Prompt) -> EncodedPrompt:
        messages = prompt.messages
        if messages is None and job.chat:
            messages = ({"role": "user", "content": prompt.text or ""},)
        if messages is None:
            ids = tokenizer(prompt.text)["input_ids"]
        elif tokenizer.chat_template is None:
            raise ModelError(
                f"Prompt {prompt.prompt_id} is a chat; the tokenizer of {job.model_path} has no chat template.",
                "Use an instruct model, or plain-text prompts without --chat.",
            )
        else:
            ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        if not ids:
            raise PromptError(f"Prompt {prompt.prompt_id} encodes to 0 tokens.", "Remove it from the prompt file.")
        return EncodedPrompt(prompt.prompt_id, [int(i) for i in ids])

    return Encoded(
        prompts=[encoded(prompt) for prompt in job.prompts],
        texts={token: tokenizer.decode([token]) for token in job.token_ids},
        special=sorted(tokenizer.all_special_ids),
    )


def reader_of(model_path: str) -> tuple[Callable[[Sequence[int]], str], list[int]]:
    """What a model's responses mean: the text of ids without special tokens, and the ids that end a response."""
    if read_config(model_path).get("model_type") == "scripted":
        return lambda ids: "".join(map(chr, ids)), [0]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    ends = end_ids(model_path, tokenizer)
    return lambda ids: str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)), ends


def end_ids(model_path: str, tokenizer: Any, *, trust_remote_code: bool = False) -> list[int]:
    """Tokens that end a response: vLLM takes them from the tokenizer, the model's and its generation configuration."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code, local_files_only=True)
    found = [tokenizer.eos_token_id, config.eos_token_id]
    with suppress(OSError):  # the checkpoint may have none
        found.append(GenerationConfig.from_pretrained(model_path, local_files_only=True).eos_token_id)
    ids: set[int] = set()
    for entry in found:
        ids.update(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return sorted(ids)
