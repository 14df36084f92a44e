"""From prompts to ids, once, with the model's own tokenizer and chat template."""

from __future__ import annotations

from mismatch_probe.engines.base import EncodeJob
from mismatch_probe.engines.checkpoint import read_config
from mismatch_probe.engines.events import Encoded
from mismatch_probe.engines.scripted import encode_scripted
from mismatch_probe.errors import ModelError, PromptError
from mismatch_probe.types import EncodedPrompt, Prompt


def encode(job: EncodeJob) -> Encoded:
    """Encodes every prompt and decodes every id.

    Raises:
        ModelError: Chat messages are given and the tokenizer has no chat template.
        PromptError: A prompt has no tokens.
    """
    if read_config(job.model_path).get("model_type") == "scripted":
        return encode_scripted(job)
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
