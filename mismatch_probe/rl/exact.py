"""The control without mismatch: the training forward pass chooses every token, and the engine only drafts.

Token t of a response is what `engines.logits.winner` draws from the trainer's logits, with noise that follows from the
request's seed and t alone. The engine draws with the same noise, so its draft mostly is what the trainer chooses; where
it is not, the trainer's token takes its place, and the engine drafts on from there. Drafts decide how long that takes,
never what comes out.

A micro-batch is done once its forward pass, which scoring and updates repeat as it is, chooses every token that it has
been given. So both sides have the same log-probs bit by bit. The lengths of the other responses are part of that pass:
they move its logits by rounding.

Shape legend: `B` responses of a micro-batch, `T` tokens of the longest, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.events import Message
from mismatch_probe.engines.logits import winner
from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.errors import EngineError
from mismatch_probe.rl.instruments import Rolled
from mismatch_probe.rl.policy import Policy
from mismatch_probe.types import Rollout, RolloutRequest, Sampling

if TYPE_CHECKING:
    from mismatch_probe.rl.loop import Pieces

# Refusals that noise of its own would bring an engine before it is said that it has some.
_LEAST_EXPECTED = 20
# Tokens that the engine drafts at first.
_DRAFTED = 64
_SLOW = (
    "The rollout engine does not draw with the noise that it is given: most drafts of the zero-mismatch control are "
    "refused as if by chance, and the run is slow."
)


@dataclass
class Drafts:
    """How a rollout's drafts did.

    Attributes:
        n_rounds: Times that the trainer looked at them.
        n_judged: Draft tokens that the trainer looked at; what follows a refused one is dropped unseen.
        n_refused: Those of them that it replaced.
        expected: How many it would replace on average if the engine drew from its distribution with noise
            of its own.
    """

    n_rounds: int = 0
    n_judged: int = 0
    n_refused: int = 0
    expected: float = 0.0

    @property
    def accepted(self) -> float | None:
        """Fraction of the judged tokens that stayed."""
        return 1 - self.n_refused / self.n_judged if self.n_judged else None

    def next_length(self, present: int) -> int:
        """How many tokens to draft at once, after so many: those that lie between two refusals on average."""
        return math.ceil(self.n_judged / self.n_refused) if self.n_refused else 2 * present

    @property
    def by_chance(self) -> bool:
        """Whether the engine's noise looks like another one."""
        return self.expected >= _LEAST_EXPECTED and self.n_refused > self.expected / 2


@dataclass
class _Response:
    """A response as far as it goes.

    Attributes:
        request: What is asked for, with the prompt.
        tokens: First those that the trainer chose, `settled` of them, then the engine's draft.
        logprobs: One per token, of the trainer's last pass.
    """

    request: RolloutRequest
    tokens: list[int] = field(default_factory=list)
    settled: int = 0
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def judge(self, logits: torch.Tensor, drafts: Drafts) -> None:
        """Takes in what `[T, V]` logits at the temperature say of the draft."""
        n, first = len(self.tokens), self.settled
        wrong = self._replace_from(first, logits)
        judged = logits[first : wrong + 1][: n - first]
        drafts.n_judged += len(judged)
        drafts.n_refused += wrong < n
        drafts.expected += float((1 - judged.softmax(-1).square().sum(-1)).sum())
        self.settled = len(self.tokens)

    def confirmed(self, logits: torch.Tensor) -> bool:
        """Whether the logits choose every token."""
        n = len(self.tokens)
        wrong = self._replace_from(0, logits)
        self.settled = len(self.tokens)
        return wrong == n

    def _replace_from(self, first: int, logits: torch.Tensor) -> int:
        """The first position from `first` on at which the logits choose another token, which takes its place, and what
        followed is gone; the length where there is none.
        """
        for t in range(first, len(self.tokens)):
            chosen = int(winner(logits[t], self.request.seed, t))
            if chosen != self.tokens[t]:
                self.tokens[t:] = [chosen]
                return t
        return len(self.tokens)


class ExactSampler:
    """Samples from the trainer's distribution.

    Attributes:
        drafts: How those of the last rollout did.
    """

    def __init__(self, pieces: Pieces, policy: Policy) -> None:
        self._p, self._policy = pieces, policy
        self._ends = frozenset(pieces.end_ids)
        self._most = pieces.config.max_tokens
        self._told = False
        self.drafts = Drafts()

    @torch.no_grad()
    def sample(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, parts: Sequence[Sequence[int]]
    ) -> list[Rollout]:
        """A response per request, with the trainer's log-probs.

        Args:
            requests: What to sample.
            sampling: Of the engine's drafts; its temperature is the trainer's.
            parts: The requests of every micro-batch that is scored and trained on, by index.

        Raises:
            EngineError: The trainer's choices never agree with each other.
        """
        self.drafts, length = Drafts(), _DRAFTED
        responses = [_Response(request) for request in requests]
        left = [[responses[i] for i in part] for part in parts]
        while left:
            if self.drafts.n_rounds > 2 * self._most + 8:
                raise EngineError(
                    "The trainer's choices under --remedy zero-mismatch do not settle: a response changes with the "
                    "length of its neighbours.",
                    "Set --micro-batch 1.",
                )
            self._draft([r for r in responses if not self._ended(r)], replace(sampling, max_tokens=length))
            self.drafts.n_rounds += 1
            left = [part for part in left if not self._settle(part)]
            length = self.drafts.next_length(length)
        if self.drafts.by_chance and not self._told:
            self._p.tell(Message(_SLOW))
            self._told = True
        return [
            Rollout(r.request.sequence_id, r.tokens, r.logprobs, "stop" if r.tokens[-1] in self._ends else "length")
            for r in responses
        ]

    def _ended(self, response: _Response) -> bool:
        tokens = response.tokens
        return bool(tokens) and (tokens[-1] in self._ends or len(tokens) >= self._most)

    def _draft(self, responses: Sequence[_Response], sampling: Sampling) -> None:
        """Lets the engine go on; all draft as many tokens, and what is too much is cut off."""
        if not responses:
            return
        wanted = [
            replace(r.request, prompt_token_ids=[*r.request.prompt_token_ids, *r.tokens], race_from=len(r.tokens))
            for r in responses
        ]
        budget = min(sampling.max_tokens, self._most - min(len(r.tokens) for r in responses))
        found = self._p.engine.generate(wanted, replace(sampling, max_tokens=budget), lambda _: None)
        for response, rollout in zip(responses, found, strict=True):
            drafted = [int(token) for token in rollout.response_token_ids][: self._most - len(response.tokens)]
            end = next((t for t, token in enumerate(drafted) if token in self._ends), len(drafted))
            # Where nothing is drafted something has to be there to be replaced.
            response.tokens += drafted[: end + 1] or [self._p.end_ids[0]]

    def _settle(self, part: Sequence[_Response]) -> bool:
        """Whether a micro-batch's forward pass changes nothing of it, and all in it have ended."""
        prompts, tokens = [r.request.prompt_token_ids for r in part], [list(r.tokens) for r in part]
        logprobs, logits = self._policy.logprobs(Batch.of(prompts, tokens, self._p.device))
        for response, values in zip(part, logprobs.cpu().numpy(), strict=True):
            response.logprobs = values[: len(response.tokens)].copy()
        for response, row in zip(part, logits, strict=True):
            response.judge(row, self.drafts)
        if [r.tokens for r in part] != tokens or not all(self._ended(response) for response in part):
            return False
        # What earlier passes chose, with neighbours of other lengths, is judged by this pass, too.
        confirmed = [response.confirmed(row) for response, row in zip(part, logits, strict=True)]
        return all(confirmed)


def require_equal(rolled: Rolled) -> None:
    """Stops a run whose rollout has other log-probs than scoring it again gives.

    Raises:
        EngineError: A bit differs.
    """
    differing = sum(a.tobytes() != b.tobytes() for a, b in zip(rolled.rollout, rolled.old, strict=True))
    if differing:
        raise EngineError(
            f"The trainer's forward pass does not repeat its bits, as --remedy zero-mismatch needs: in step "
            f"{rolled.step} {differing} of {len(rolled.old)} responses differ.",
            "Use deterministic kernels, for example with CUBLAS_WORKSPACE_CONFIG=:4096:8, or --device cpu.",
        )
