"""What lies inside the models as sections of an attribution, and what all of its sections are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.metrics.inside import THRESHOLD
from mismatch_probe.report.attribute_words import conclusion, score_text
from mismatch_probe.report.format import NONE, count, interval, number, visible
from mismatch_probe.report.matrix import dtype_order
from mismatch_probe.report.sections import Section
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Document = Mapping[str, Any]

FILE = "attribute/attribution.json"
"""Where everything is that a table leaves out."""
# So many layers are all shown; of more, about this many and those that stand out.
_LAYERS = 12
_KINDS = {
    "module": "its own result",
    "between": "what reaches its input",
    "end": "its code outside its modules",
}
_SCORES = (
    "A score is how far the engines are apart, over √2 times the rounding error that one of them makes against a wider "
    f"forward pass of the same input; rounding alone stays below {THRESHOLD:g}."
)


@dataclass(frozen=True)
class AttributedSection(Section):
    """A section with what belongs to its table, which may be empty where the text says why.

    Attributes:
        figures: Names of figures, as in `ATTRIBUTE_GUIDES`.
        wide: Columns that hold sentences.
        brief: Whether Markdown has it too.
        open: Whether all rows show at once, however many there are.
    """

    figures: tuple[str, ...] = ()
    wide: tuple[int, ...] = ()
    brief: bool = True
    open: bool = False


def value_cell(metric: Document | None) -> str:
    """A value over its interval, or over the reason why it has none."""
    if metric is None:
        return NONE
    limits = interval(metric.get("ci_low"), metric.get("ci_high"))
    return stacked(number(metric.get("value")), limits or visible(metric.get("why") or ""))


def nothing(why: str) -> str:
    """In place of a table."""
    return f"Nothing to show here: {visible(why) or 'no reason was recorded'}."


def inside_sections(document: Document) -> list[AttributedSection]:
    """Both models by dtype, by layer, and by module of the layer that stands out most."""
    layers = document["layers"]
    if not layers["dtypes"]:
        return [AttributedSection("inside", "Inside both models", nothing(layers["why"]), Table((), ()))]
    found = {name: layers["dtypes"][name] for name in dtype_order(layers["dtypes"])}
    concluded = document["conclusions"]["dtypes"]
    sections = [_by_dtype(found, layers, concluded)]
    shown = {name: row for name, row in found.items() if row["layers"]}
    if shown:
        sections.append(_by_layer(shown))
    name = document["rollout_dtype"]
    # What was looked into may leave the pair's own dtype out.
    looked = [dtype for dtype in (name, *shown) if dtype in shown and shown[dtype]["modules"]]
    looked.sort(key=lambda dtype: concluded[dtype]["code"] not in ("fault", "not finite"))
    if looked:
        sections.append(_by_module(looked[0], shown[looked[0]]))
    return sections


def _by_dtype(found: Mapping[str, Document], layers: Document, concluded: Mapping[str, Document]) -> AttributedSection:
    rows = []
    for name, row in found.items():
        if not row["layers"]:
            rows.append((visible(name), NONE, NONE, NONE, visible(row["why"])))
            continue
        tokens = f"{count(row['n_tokens'])} tokens of {count(row['n_sequences'])} sequences"
        error = number(row["layers"][-1]["relative_error"])
        worst = row["worst_layer"]
        scores = {layer["layer"]: layer["score"] for layer in row["layers"]}
        step = NONE if worst is None else stacked(score_text(scores[worst]), f"layer {worst}")
        cells = (error, value_cell(row["growth_per_layer"]), step, _verdict(row, concluded[name], name))
        rows.append((stacked(visible(name), tokens), *cells))
    text = (
        "The trainer's forward pass over the engine's recorded activations. The relative error of the residual stream "
        "holds what all layers before have added; a layer's step is what it adds itself when it is given the engine's "
        f"input, and the largest score is of a step. {_SCORES} {visible(layers['eager_note'])}"
    )
    shift = layers["eager_vs_compiled_shift"]
    if shift is not None and shift["value"] is not None:
        text += f" Between eager and compiled lies an RMS of {number(shift['value'])} nats."
    header = ("dtype", "error at the end", "growth a layer", "largest score", "verdict")
    figures = ("attribute-layers", "attribute-lens")
    return AttributedSection("inside", "Inside both models", text, Table(header, tuple(rows)), figures, wide=(4,))


def _verdict(row: Document, concluded: Document, dtype: str) -> str:
    first = row["first_beyond"]
    told = concluded["code"] in ("fault", "not finite") and first is not None
    return (f"Layer {first} is the first beyond the threshold. " if told else "") + conclusion(concluded, dtype)


def _by_layer(found: Mapping[str, Document]) -> AttributedSection:
    cells = {name: {layer["layer"]: _layer_cell(layer) for layer in row["layers"]} for name, row in found.items()}
    every = sorted({layer for row in cells.values() for layer in row})
    kept = _kept(every, found.values())
    rows = tuple((str(layer), *(row.get(layer, NONE) for row in cells.values())) for layer in kept)
    left = "" if len(kept) == len(every) else f" Of {len(every)} layers, {len(kept)} are shown; {FILE} has them all."
    text = (
        "Relative error of the residual stream after each layer; below it the score of the layer's own step, and the "
        f"KL, in nats, of what both residual streams would predict if the head came next (the logit lens).{left}"
    )
    table = Table(("layer", *(visible(name) for name in cells)), rows)
    return AttributedSection("layers", "Layer by layer", text, table, brief=False)


def _layer_cell(layer: Document) -> str:
    lens = layer["lens_kl"]
    parts = [f"score {score_text(layer['score'])}", "" if lens is None else f"lens {number(lens)}"]
    return stacked(number(layer["relative_error"]), ", ".join(part for part in parts if part))


def _kept(layers: Sequence[int], found: Iterable[Document]) -> list[int]:
    """Layers spread over the depth, the last one, and every one that is worst or beyond the threshold."""
    if len(layers) <= _LAYERS:
        return list(layers)
    every = -(-len(layers) // (_LAYERS - 2))
    kept = {*layers[::every], layers[-1]}
    for row in found:
        kept |= {row["worst_layer"]} - {None}
        kept |= {layer["layer"] for layer in row["layers"] if layer["score"] > THRESHOLD}
    return sorted(kept)


def _by_module(dtype: str, row: Document) -> AttributedSection:
    located, worst = row["located"] or {}, row["worst_layer"]
    layer = worst if located.get("layer") is None else located["layer"]
    inside = [module for module in row["modules"] if module["layer"] in (layer, None)]
    apart = [module for module in inside if module["apart"]]
    rows = tuple(
        (
            stacked(visible(module["name"]), _KINDS.get(module["kind"], visible(module["kind"]))),
            number(module["apart"]),
            number(module["engine_error"]),
            number(module["trainer_error"]),
            score_text(module["score"]),
        )
        for module in apart
    )
    where = "whose step scores highest" if located.get("layer") is None else "that something stands out in"
    same = len(inside) - len(apart)
    text = (
        f"In {visible(dtype)}: the layer {where}, and what lies outside of the layers. Every module is given the "
        "engine's input, so that a difference is its own, or that of the code between it and the one before; errors "
        "are relative."
    )
    text += f" {same} of {len(inside)} tensors are the same on both sides, bit for bit, and left out." if same else ""
    header = ("module", "engines apart", "engine's error", "trainer's error", "score")
    title = "Modules outside of the layers" if layer is None else f"Modules of layer {layer}"
    return AttributedSection("modules", title, text, Table(header, rows), brief=False)
