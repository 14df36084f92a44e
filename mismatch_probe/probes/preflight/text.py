"""Do tokenizer, prompts and lengths fit the model?"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding


@check("vocabulary", needs=("tokenizer",))
def vocabulary(subject: Subject) -> Iterator[Finding]:
    """Token ids that have no row in the embedding: of the vocabulary, or of tokens that were added and may never occur,
    as Gemma 3's token for an image in a text model.
    """
    rows, tokenizer = subject.config.get("vocab_size"), subject.checkpoint.tokenizer
    own = -1 if tokenizer.largest_id is None else tokenizer.largest_id
    largest = max(own, tokenizer.largest_added_id)
    if isinstance(rows, int) and largest >= rows:
        yield found("vocabulary-too-small", "fail" if own >= rows else "warn", largest_id=largest, rows=rows)


@check("chat-template")
def chat_template(subject: Subject) -> Iterator[Finding]:
    """Messages without a template that renders them."""
    chats = [p.prompt_id for p in subject.use.prompts if p.messages is not None or subject.use.chat]
    if (chats or subject.use.chat) and not subject.checkpoint.tokenizer.has_chat_template:
        yield found("chat-template-none", "fail", next(iter(chats), ""), prompts=len(chats))


@check("lengths")
def lengths(subject: Subject) -> Iterator[Finding]:
    """Prompts and the longest response against the context. Tokens that a chat template adds are not counted."""
    context, budget = subject.model.context, subject.use.max_tokens
    if context is None or budget is None or not subject.exceeds(context):
        return
    counts = subject.prompt_tokens or []
    longest = max(counts, default=0)
    if longest >= context:
        where = subject.use.prompts[counts.index(longest)].prompt_id
        too_long = sum(count >= context for count in counts)
        yield found("prompt-too-long", "fail", where, tokens=longest, context=context, prompts=too_long)
    elif longest + budget > context:
        yield found("responses-cut", "warn", max_tokens=budget, context=context, longest=longest)
