"""A diagnosis: what explains a table, class after class, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mismatch_probe.config.commands import DiagnoseSettings
from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.recording import Recording
from mismatch_probe.probes.audit.baseline import read_audit
from mismatch_probe.probes.diagnose.active import TableClass, active
from mismatch_probe.probes.diagnose.base import (
    BEYOND_BASELINE,
    CAP,
    Signature,
    State,
    mean_gap,
    noise_of,
    plain,
    quiet,
    residual,
    widens,
)
from mismatch_probe.probes.diagnose.confidence import confidence, features
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask, read_evidence
from mismatch_probe.probes.diagnose.readings import read_causes
from mismatch_probe.probes.diagnose.search import Candidate, candidates
from mismatch_probe.probes.diagnose.signatures import signatures
from mismatch_probe.probes.explain.audited import pair_of
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.recorded import open_dump
from mismatch_probe.results.diagnosis import Active, DiagnosedClass, Diagnosis, Outcome, Remainder, Rival, ShownToken

MOST_FAULTS = 3
LEAST_GAIN, LEAST_TOTAL, LEAST_UNITS = 0.01, 20.0, 1.5
"""A class is found from so many nats per token, nats in all, and standard errors over prompts."""
LEAST_OF_FIRST = 0.08
"""A further class gains at least this share of what the first did: no signature is exact, and leaves traces."""
LEAST_MOVED_GAIN = 0.08
"""What moves expectations gains at least so many nats a token: large noise is lopsided and gives less than that."""
MUCH_LEFT = 4.0
"""What leaves more than so many times the baseline gains twice as much."""
LEAST_CONTRAST = 2.0
"""Where tokens are off by more than rounding, those of a class are so many times as far off."""
LEAST_APART, LEAST_CONTRAST_KNOWN = 10.0, 4.0
"""The same of a pattern of noise beside a class that gives all numbers another meaning; and where the other tokens are
known to be off by no more than rounding."""
LEAST_FACTOR = 8.0
"""Noise that is so many times as wide stands out where its mean does not."""
LEAST_PATTERN_GAIN, LEAST_PATTERN_GAP = 0.08, 0.02
"""A pattern of noise gains so many nats a token; tokens that are noisier have at least this mean |d|."""
MOST_LEFT = 0.85
"""What moves expectations leaves at most this share of the mean residual, or no more where it gains much."""
LARGE_GAIN = 0.5
LONG = 1.0
"""Above this standard deviation of D, weights exp(D) of sequences are far from 1."""
USUAL_ROUNDING = 0.06
"""Mean |d| in nats up to which symmetric noise is taken for rounding where no baseline is known."""
_TOKENS = 5
_MOST = 0.5  # of the tokens that show a class
_ONE_OF = ("labels", "weights")
_RIVALS = 4


@dataclass(frozen=True)
class Found:
    """A class that was accepted.

    Attributes:
        candidate: It.
        before: What was explained before.
        ranked: All that competed, it included, the best first.
    """

    candidate: Candidate
    before: State
    ranked: tuple[Candidate, ...]

    @property
    def rivals(self) -> tuple[Candidate, ...]:
        """Other signatures that gained something then, the best first."""
        return tuple(one for one in self.ranked if one is not self.candidate)


def explain_away(
    evidence: Evidence, known: Mapping[str, Signature] | None = None, first: Sequence[Candidate] | None = None
) -> tuple[list[Found], State]:
    """Accepts the signature that gains most, takes off what it explains, and looks again.

    Args:
        evidence: The table.
        known: Signatures that compete; by default all.
        first: How they rank while nothing is explained, where that is computed already.

    Returns:
        What was found, the one that explains most first, and what is explained then. A class is dropped when those
        found after it explain as much without it.
    """
    known = dict(signatures() if known is None else known)
    state, found, left = State.start(evidence), list[Found](), dict(known)
    while left and len(found) < MOST_FAULTS:
        ranked = candidates(evidence, state, left) if found or first is None else first
        accepted = [one for one in ranked if _accepted(evidence, state, one, found)]
        if not accepted:
            break
        # What is told by nothing else comes last.
        best = max(accepted, key=lambda one: (not one.signature.last, one.gain))
        found.append(Found(best, state, tuple(ranked)))
        state = best.fit.state
        del left[best.signature.name]
        if best.signature.last:
            break
    needless = _needless(evidence, found)
    if needless is None:
        return found, state
    del known[needless]
    return explain_away(evidence, known)


def _needless(evidence: Evidence, found: Sequence[Found]) -> str | None:
    """The name of a class without which the others, fitted again, explain as much."""
    if any(one.candidate.signature.last for one in found):
        return None
    least = _least_gain(found) * len(evidence)
    total = sum(one.candidate.total for one in found)
    for at, one in enumerate(found[:-1]):
        # A pattern of noise never takes the place of what says why.
        if one.candidate.signature.seen_by != "pattern" and any(
            later.candidate.signature.seen_by == "pattern" for later in found[at + 1 :]
        ):
            continue
        state, without = State.start(evidence), 0.0
        for other in found:
            name = other.candidate.signature.name
            again = [] if other is one else candidates(evidence, state, {name: other.candidate.signature})
            for candidate in again:
                state, without = candidate.fit.state, without + candidate.total
        if without > total - least:
            return one.candidate.signature.name
    return None


def _least_gain(found: Sequence[Found]) -> float:
    """Nats a token that a class has to gain beside others."""
    # What facts gain is of no scale: a token that nothing accounts for costs as much as any.
    first = next((one.candidate.gain for one in found if one.candidate.signature.seen_by != "fact"), 0.0)
    return max(LEAST_GAIN, LEAST_OF_FIRST * first)


def _accepted(evidence: Evidence, state: State, one: Candidate, found: Sequence[Found]) -> bool:
    if one.total < LEAST_TOTAL:
        return False
    if one.signature.seen_by == "fact":
        return True
    enough = one.gain >= _least_gain(found) and one.units >= LEAST_UNITS
    return enough and _stands_out(evidence, state, one) and all(_beside(evidence, state, e, one) for e in found)


def _stands_out(evidence: Evidence, state: State, one: Candidate) -> bool:
    """Whether what is expected anew fits, and whether noise is large where it is said to be."""
    moved = _moved(one, state)
    if moved.any():
        some = moved & plain(state)
        left, gap = (mean_gap(evidence, which, some) for which in (one.fit.state, state))
        most = MOST_LEFT if one.gain < LARGE_GAIN else 1.0
        least = LEAST_MOVED_GAIN * (1 if quiet(evidence, one.fit.state, some, MUCH_LEFT) else 2)
        return one.gain >= least and left <= most * gap
    if not widens(one.fit, state):
        return True
    shown, pattern = one.fit.shown, one.signature.seen_by == "pattern"
    there, elsewhere = (mean_gap(evidence, state, some) for some in (shown, ~shown))
    least = LEAST_PATTERN_GAP * pattern if evidence.baseline is None else BEYOND_BASELINE * evidence.baseline
    if there < least or (pattern and one.gain < LEAST_PATTERN_GAIN):
        # Rare tokens that are far off make up a mean: what a dump names, such as a replica, is told beside them.
        wide = float(one.fit.parameters.get("factor", 0.0)) >= LEAST_FACTOR
        return wide and one.signature.seen_by == "key" and one.signature.kind == "forward"
    # What differs little from tokens that are off themselves is no fault of its own.
    apart = there >= LEAST_CONTRAST * elsewhere
    return one.signature.kind == "weights" or apart or quiet(evidence, state, ~shown)


def _beside(evidence: Evidence, state: State, earlier: Found, one: Candidate) -> bool:
    """Whether a class can be found beside an earlier one."""
    # Of classes that give all numbers another meaning only one is found: none is exact, and their shapes are alike.
    # Steps, versions of weights and repeated prompts go together: what one of them shows, the others show too.
    if one.signature.kind in _ONE_OF and earlier.candidate.signature.kind == one.signature.kind:
        return False
    if one.signature.seen_by != "pattern" and not one.signature.last:
        return True
    shown = one.fit.shown
    # What is left where numbers have another meaning says little of rounding, unless it is left at some tokens only.
    if _relabels(earlier):
        there, elsewhere = (mean_gap(evidence, state, some) for some in (shown, ~shown))
        known = evidence.baseline is not None and quiet(evidence, state, ~shown)
        return not one.signature.last and there >= (LEAST_CONTRAST_KNOWN if known else LEAST_APART) * elsewhere
    # Nor does what is left of tokens whose noise is explained.
    noisier = earlier.candidate.fit.shown & widens(earlier.candidate.fit, earlier.before)
    return float((shown & noisier).sum()) <= _MOST * float(shown.sum())


def _moved(one: Candidate, state: State) -> Mask:
    """`[N]` tokens of which something else is expected."""
    after = one.fit.state
    return np.asarray(one.fit.shown & state.known & after.known & (after.expected != state.expected))


def _relabels(one: Found) -> bool:
    return one.candidate.signature.kind == "labels" and bool(_moved(one.candidate, one.before).any())


def remainder(evidence: Evidence, state: State) -> Remainder:
    """What is left."""
    use = state.known
    rest = np.clip(residual(evidence, state)[use], -CAP, CAP)
    sums = np.bincount(evidence.sequence[use], rest, len(evidence.prompt))
    noise = noise_of(evidence, state, np.ones(len(evidence), np.bool_))
    some = len(rest) > 0
    return Remainder(
        rms=float(np.sqrt(np.mean(rest**2))) if some else 0.0,
        mean_abs=float(np.abs(rest).mean()) if some else 0.0,
        mean=float(rest.mean()) if some else 0.0,
        degrees=noise.degrees,
        mean_ratio=float(np.exp(rest).mean()) if some else 1.0,
        mean_inverse_ratio=float(np.exp(-rest).mean()) if some else 1.0,
        sequence_spread=float(sums.std()),
        baseline=evidence.baseline,
    )


def diagnosed(evidence: Evidence, one: Found) -> DiagnosedClass:
    """A class as the document tells it."""
    fit, signature = one.candidate.fit, one.candidate.signature
    shown = fit.shown
    return DiagnosedClass(
        name=signature.name,
        title=signature.title,
        kind=signature.kind,
        confidence=confidence(features(evidence, one)),
        gain=one.candidate.gain,
        gain_units=one.candidate.units,
        parameters=dict(fit.parameters),
        n_shown=int(shown.sum()),
        share_shown=float(shown.mean()),
        gap_before=mean_gap(evidence, one.before, shown),
        gap_after=mean_gap(evidence, fit.state, shown) if (shown & fit.state.known).any() else None,
        tokens=tuple(_tokens(evidence, one)),
        causes=signature.causes,
        rivals=tuple(Rival(name=rival.signature.name, gain=rival.gain) for rival in one.rivals[:_RIVALS]),
        confirm=signature.confirm,
        fix=signature.fix,
    )


def _tokens(evidence: Evidence, one: Found) -> list[ShownToken]:
    """Those that show it most, at most one of a sequence."""
    index = np.flatnonzero(one.candidate.fit.shown)
    size = np.abs(residual(evidence, one.before)[index])
    order = index[np.argsort(-size, kind="stable")]
    _, first = np.unique(evidence.sequence[order], return_index=True)
    return [_token(evidence, int(i)) for i in order[np.sort(first)][:_TOKENS]]


def _token(evidence: Evidence, i: int) -> ShownToken:
    b, a = float(evidence.rollout[i]), float(evidence.trainer[i])
    return ShownToken(
        place=f"{evidence.places[int(evidence.sequence[i])]}[{int(evidence.position[i])}]",
        token_id=int(evidence.ids[i]),
        rollout_logprob=b if np.isfinite(b) else None,
        trainer_logprob=a if np.isfinite(a) else None,
    )


def experimented(
    evidence: Evidence, found: list[Found], recording: Recording, settings: DiagnoseSettings, progress: Progress
) -> Active:
    """What experiments say of what was found."""
    table = []
    for one in found:
        signature, shown = one.candidate.signature, one.candidate.fit.shown
        causes = read_causes(signature.name, signature.causes, evidence, shown)
        named = TableClass(signature.name, signature.title, signature.fix, causes, float(shown.mean()))
        table.append((named, shown))
    return active(evidence, table, recording, settings, progress)


def outcome(found: list[Found], left: Remainder, tried: Active | None = None) -> Outcome:
    """What is to be said of all of it; what experiments settled outranks the table."""
    if tried is not None and tried.settled != "neither-side":
        if tried.settled != "numerics":
            return "fault"
        return "length-product" if left.sequence_spread > LONG else "rounding"
    if found:
        return "fault"
    if left.baseline is None and left.mean_abs > USUAL_ROUNDING:
        return "cannot-tell"
    return "length-product" if left.sequence_spread > LONG else "rounding"


def diagnose(
    source: str,
    settings: DiagnoseSettings,
    audit: str | None = None,
    pair: str | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Reads a dump and says what explains its gap: `mismatch_probe.diagnose`.

    Args:
        source: A dump, the folder of `ingest`, or that of `compare --from` a dump.
        settings: How the dump is read, and with which models experiments are made.
        audit: An `audit.json`, or its folder, of the model: its gap is what rounding makes.
        pair: The audit's pair, `rollout/trainer`; None for the one that its verdict is of.
        progress: Told what takes long.

    Raises:
        IngestError: The dump cannot be read, or has log-probs of one side only.
        TableError: There is no such audit.
        UsageError: The audit has no such pair.
    """
    baseline = None if audit is None else pair_of(read_audit(audit), audit, pair).mean_abs_logprob_diff.value
    recording = open_dump(source, settings, progress or Progress())
    facts = recording.recorded
    if not (facts.rollout and facts.trainer):
        side = "rollout" if facts.rollout else "trainer"
        raise IngestError(
            f"{source} has log-probs of the {side} only, and a diagnosis compares two sides.",
            f"Score its ids with the model: `mismatch-probe compare --from {source} --model MODEL --out RUN`.",
        )
    evidence = read_evidence(recording, baseline=baseline)
    found, state = explain_away(evidence)
    left = remainder(evidence, state)
    tried = experimented(evidence, found, recording, settings, progress or Progress()) if settings.model else None
    return Diagnosis(
        **Diagnosis.stamp(),
        source=facts.file,
        n_tokens=len(evidence),
        n_sequences=len(evidence.prompt),
        n_prompts=len(np.unique(evidence.prompt)),
        outcome=outcome(found, left, tried),
        classes=() if tried is not None and tried.ruled_out else tuple(diagnosed(evidence, one) for one in found),
        remainder=left,
        active=tried,
        findings=facts.file.findings,
    )
