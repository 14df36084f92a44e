"""Faults by cause, their strengths and the cases that are made of them.

A case belongs to the half `test` where the index of its model plus the index of its strength is odd, else to `dev`. The
halves share no prompt and no seed. Of the strengths of a fault each model and dtype gets two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mismatch_probe.types import Dtype
from validation.faults.bench import Bench, Place
from validation.faults.edits import Row
from validation.faults.models import MODELS, ModelName, Split

RULE = "test where (index of the model + index of the strength) is odd, models in the order " + ", ".join(MODELS)
Combination = tuple[ModelName, Dtype]
SHORT: dict[Dtype, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What only needs another forward pass or an edit is made everywhere.
EVERYWHERE: tuple[Combination, ...] = (
    ("smollm2", "bfloat16"),
    ("chain", "bfloat16"),
    ("mixture", "bfloat16"),
    ("absolute", "bfloat16"),
    ("chain", "float16"),
    ("mixture", "float32"),
    ("smollm2", "float32"),
    ("absolute", "float16"),
)
# Rotary positions, and weights that the engine can be given.
ROTARY: tuple[Combination, ...] = (
    ("smollm2", "bfloat16"),
    ("chain", "bfloat16"),
    ("mixture", "bfloat16"),
    ("chain", "float16"),
    ("mixture", "float32"),
    ("chain", "float32"),
)
Strength = Any


@dataclass(frozen=True)
class Made:
    """Rows of a case, and the weights that were at work where they are not the checkpoint's.

    Attributes:
        rows: As the dump has them.
        trainer, engine: Names of weights, see `weights`; of the last step where they change.
        trainer_dtype: Where it is not the engine's.
        note: What else is to be known.
    """

    rows: Sequence[Row]
    trainer: str = ""
    engine: str = ""
    trainer_dtype: Dtype | None = None
    note: str = ""


Make = Callable[[Bench, Place, Strength], Made | list[Row]]


@dataclass(frozen=True)
class Fault:
    """A fault and how it is made.

    Attributes:
        cause: Its name, which is its cause's unless `CAUSES` has another.
        class_: What a table can tell of it.
        strengths: What `make` gets, one at a time; by model where a mapping.
        make: Makes the rows of a case.
        combinations: Models and dtypes.
        physical: Whether an engine or trainer computed it, and no edit.
        also: Other classes that are right.
        clean: Whether it is no fault.
        per_place: Strengths that each model and dtype gets.
    """

    cause: str
    class_: str
    strengths: tuple[Strength, ...]
    make: Make
    combinations: tuple[Combination, ...] = EVERYWHERE
    physical: bool = True
    also: tuple[str, ...] = ()
    clean: bool = False
    per_place: int = 2


@dataclass(frozen=True)
class Case:
    """One fault at one strength, of one model and dtype."""

    fault: Fault
    index: int
    model: ModelName
    dtype: Dtype

    @property
    def strength(self) -> Strength:
        return self.fault.strengths[self.index]

    @property
    def cause(self) -> str:
        """As `diagnose` calls it; some causes have several faults here."""
        name = self.fault.cause
        return "rounding" if self.fault.class_ == "rounding" else CAUSES.get(name, name)

    @property
    def split(self) -> Split:
        return split_of(self.model, self.index)

    @property
    def place(self) -> Place:
        return Place(self.model, self.dtype, self.split)

    @property
    def name(self) -> str:
        strength = str(self.strength).replace(":", "_").replace("|", "+").replace(" ", "")
        return f"{self.fault.cause}-{strength}-{self.model}-{SHORT[self.dtype]}"


def split_of(model: ModelName, index: int) -> Split:
    """The half of a case."""
    return "test" if (MODELS.index(model) + index) % 2 else "dev"


# Causes of faults that are made in more than one way.
CAUSES = {
    "adapter-ignored-steps": "adapter-ignored",
    "decode-differs-from-prefill-unseen": "decode-differs-from-prefill",
    "dropout-two-passes": "dropout",
    "null-at-certain-tokens": "missing-at-certain-tokens",
    "other-kernels": "batch-size",
    "soft-cap": "soft-cap-or-sink-missing",
}
FAULTS: list[Fault] = []


def fault(cause: str, class_: str, *strengths: Strength, **options: Any) -> Callable[[Make], Make]:
    """Registers how a fault is made."""

    def register(make: Make) -> Make:
        FAULTS.append(Fault(cause, class_, strengths, make, **options))
        return make

    return register


def cases_of(found: Fault) -> list[Case]:
    """Its cases: each model and dtype gets some strengths, the next one those that follow."""
    count = len(found.strengths)
    return [
        Case(found, (place + offset) % count, model, dtype)
        for place, (model, dtype) in enumerate(found.combinations)
        for offset in range(min(count, found.per_place))
    ]


def cases() -> list[Case]:
    """All of them, the cheapest first."""
    from validation.faults import alignment, clean, forward, meaning, other_weights, pairs, steps

    modules = [m.__name__ for m in (alignment, meaning, clean, forward, other_weights, steps, pairs)]
    found = [case for fault in FAULTS for case in cases_of(fault)]
    return sorted(found, key=lambda case: (modules.index(case.fault.make.__module__), "steps" in case.fault.cause))


# What SIGNATURES lists and no case shows, with the reason.
NOT_MADE = {
    "batch-size": "in small models passes of any batch agree to the bit on a CPU; other-kernels stands for it",
    "engine-lags-half-ulp": "grows over many hundred small updates; after eight the engine's own rounding hides it",
    "image": "needs a model with images",
    "fp16-overflow": "an audit's finding; no column of a dump shows the module",
    "tensor-parallel-sum": "one device; lora-scale stands for an update of another size",
    "routing-replay": "routes are no column of a dump; routing flips are in the clean mixtures",
    "drift at learning rate 0": "made as unknown-drift: noise of the engine's weights whose size wanders",
}
