"""Does `attribute` name what is at fault in the trainer? Accuracy by dtype, and by the size of the fault.

vLLM runs a model once per dtype and its inside is traced. Then one weight tensor of the trainer's copy after another
gets a random perturbation of a given relative Frobenius norm, and the trainer's inside is compared with the trace. The
right answer names the module (and so the layer); on the unaltered model it is "no single layer".

With --code the fault is in the code of one decoder layer instead (`planted_code.py`). The right answer names layer and
place, or, where FP32 shows it to be less than a 16-bit dtype rounds, that it is not detectable there.

    python validation/planted_faults.py                                  # every weight of a tiny Llama
    python validation/planted_faults.py --model smollm2-135m --sample 40
    python validation/planted_faults.py --code                           # every layer of a tiny Llama, a tiny Mistral
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, this folder's sibling `tests` is not on the path

from mismatch_probe.engines.attribute.inside_job import kept_of
from mismatch_probe.engines.attribute.rollout import RolloutVariants
from mismatch_probe.engines.attribute.trace import TraceRequest, layers_of
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.checkpoint import read_config
from mismatch_probe.engines.models import resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.metrics import inside
from mismatch_probe.metrics.conclusions import Conclusion, conclude
from mismatch_probe.metrics.inside import Inside, Located
from mismatch_probe.types import Sampling
from validation.planted_code import FAULTS, WINDOW, CodeFault

if TYPE_CHECKING:
    from torch import nn

    from mismatch_probe.engines.attribute.inside import Difference

SIZES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05)
SEQUENCES, TOKENS = 6, 32
# Of faults in code: longer than the window, and long enough for angles to lose their fraction in 16 bits.
CODE_TOKENS = 96


def sequences_of(vocabulary: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Random ids."""
    draw = np.random.default_rng(0)
    return tuple(tuple(row) for row in draw.integers(3, min(vocabulary, 30_000), (SEQUENCES, tokens)).tolist())


def rollout_job(checkpoint: Path, dtype: Any, tokens: int = TOKENS) -> RolloutJob:
    """vLLM on a CPU, without requests."""
    settings = rollout_settings("cpu", dtype, eager=True, in_process=True, kv_cache_gib=1)
    return RolloutJob(
        "vllm", str(checkpoint), dtype, "cpu", Sampling(1), [], SEQUENCES, 0, 2 * tokens, arguments=settings.arguments
    )


def trace_request(checkpoint: Path, folder: Path, tokens: int = TOKENS) -> TraceRequest:
    """Some sequences of random ids."""
    config = read_config(str(checkpoint))
    rows = tuple(range(0, SEQUENCES * tokens, 8))
    return TraceRequest(str(folder), sequences_of(config["vocab_size"], tokens), layers_of(config), rows)


def trace(checkpoint: Path, dtype: Any, folder: Path, tokens: int = TOKENS) -> None:
    """vLLM's inside, in a process of its own."""
    settings = rollout_settings("cpu", dtype, eager=True, in_process=True, kv_cache_gib=1)
    request = trace_request(checkpoint, folder, tokens)
    job = RolloutVariants(rollout_job(checkpoint, dtype, tokens), {}, {}, [], request)
    EngineProcess("vllm", settings.environment, folder.parent / "vllm.log").run(job, lambda *_: None)


class Trainer:
    """A trainer whose weights can be altered for a while.

    Args:
        checkpoint: Its folder.
        dtype: Of weights and compute.
        folder: The trace's.
    """

    def __init__(self, checkpoint: Path, dtype: Any, folder: Path) -> None:
        from mismatch_probe.engines.attribute.inside import InsideComparison
        from mismatch_probe.engines.hf.engine import HfTrainer

        job = TrainerJob("hf", str(checkpoint), dtype, "cast", "padded", None, "cpu", 1.0, (), 0, 1 << 30)
        self._engine, self._dtype = HfTrainer(job), dtype
        model = self._engine.run_on_model(lambda model: model)
        self._model, self._comparison = model, InsideComparison(self._engine, model, folder)
        self.weights = dict(self._model.named_parameters())

    @contextmanager
    def altered(self, name: str, size: float, seed: int = 0) -> Iterator[None]:
        """Adds Gaussian noise of relative Frobenius norm `size` to a weight."""
        weight = self.weights[name].data
        before = weight.clone()
        weight += noise(before, size, seed)
        try:
            yield
        finally:
            self.weights[name].data.copy_(before)

    def differences(self, kinds: Sequence[str]) -> list[Difference]:
        """Of the passes `kinds`."""
        return self._comparison.differences(kinds)

    def inside(self) -> Inside:
        """What `attribution.json` has of the dtype."""
        return inside.inside_of(*kept_of(self._comparison), self._dtype)

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """Name and module of every decoder layer."""
        return [(name, self._model.get_submodule(name)) for name in self._comparison.layers]

    def locate(self) -> Located:
        """What stands out."""
        found = self.differences(("module",))
        squares = {key: np.stack([getattr(d, key) for d in found]) for key in ("apart", "trainer", "size")}
        apart, own = (inside.relative(squares[key], squares["size"]) for key in ("apart", "trainer"))
        scores = inside.scores(apart, own, self._dtype)
        names, layers, kinds = zip(*((d.name, d.layer, d.kind) for d in found), strict=True)
        return inside.locate(names, layers, kinds, scores, len(self._comparison.layers))


def noise(weight: Any, size: float, seed: int = 0) -> Any:
    """Gaussian noise of a relative Frobenius norm."""
    import torch

    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * (size * weight.float().norm() / drawn.norm())).to(weight.dtype)


def names_it(located: Located, weight: str) -> bool:
    """Whether the answer is the module of a weight; a tied weight has two of them."""
    module = weight.removesuffix(".weight").removesuffix(".bias")
    if module.endswith((".experts.gate_up_proj", ".experts.down_proj")):  # all experts of a layer, in one module
        module = module.rpartition(".")[0]
    tied = {"model.embed_tokens": ("model.embed_tokens", "lm_head")}
    return located.name in tied.get(module, (module,))


@dataclass(frozen=True)
class Accuracy:
    """Of one dtype and size.

    Attributes:
        cases: Weights that were altered.
        module, layer: Answers that named the module, and its layer.
    """

    cases: int
    module: int
    layer: int


def accuracy(trainer: Trainer, weights: Sequence[str], size: float) -> Accuracy:
    """Alters one weight after another."""
    from mismatch_probe.engines.audit.places import layer_of

    module = layer = 0
    for index, name in enumerate(weights):
        with trainer.altered(name, size, index):
            found = trainer.locate()
        module += names_it(found, name)
        layer += found.verdict != "no single layer" and (found.layer == layer_of(name))
    return Accuracy(len(weights), module, layer)


@dataclass(frozen=True)
class CodeAnswers:
    """Of a fault of one strength in one layer after another, the answers of a dtype.

    Attributes:
        named: That have the layer and the place.
        hidden: That have the fault below what the dtype rounds, and name nothing.
        cases: Layers.
        scores: Of what was named, else the largest of a module, by layer.
    """

    named: int
    hidden: int
    cases: int
    scores: tuple[float, ...]

    def __str__(self) -> str:
        answers = [f"{self.named}/{self.cases} named"] if self.named else []
        answers += [f"{self.hidden}/{self.cases} not detectable"] if self.hidden else []
        wrong = self.cases - self.named - self.hidden
        answers += [f"{wrong}/{self.cases} WRONG"] if wrong else []
        return f"{', '.join(answers)} ({', '.join(f'{score:.3g}' for score in self.scores)})"


def code_answers(trainers: Mapping[str, Trainer], fault: CodeFault, strength: float) -> dict[str, CodeAnswers]:
    """Plants a fault into every layer, one at a time, of the trainers of all dtypes."""
    found: dict[str, list[Conclusion]] = {dtype: [] for dtype in trainers}
    places = []
    for index, (name, _) in enumerate(next(iter(trainers.values())).layers):
        with ExitStack() as stack:
            for trainer in trainers.values():
                stack.enter_context(fault.planted(trainer.layers[index][1], strength))
            insides = {dtype: trainer.inside() for dtype, trainer in trainers.items()}
        for dtype, conclusion in conclude(insides, ("bfloat16", "bfloat16"), routers=False).dtypes.items():
            found[dtype].append(conclusion)
        places.append(("layer", fault.kind, name + fault.place))
    answers = {}
    for dtype, conclusions in found.items():
        right = [c.place == place for c, place in zip(conclusions, places, strict=True)]
        named = sum(c.code == "fault" and same for c, same in zip(conclusions, right, strict=True))
        hidden = sum(c.code == "hidden" and same for c, same in zip(conclusions, right, strict=True))
        answers[dtype] = CodeAnswers(named, hidden, len(places), tuple(c.score for c in conclusions))
    return answers


def code_grid(checkpoint: Path, folder: Path, dtypes: Sequence[str], *, windowed: bool) -> None:
    """Traces a model and prints a row for each fault and strength."""
    trainers = {}
    for dtype in dtypes:
        trace(checkpoint, dtype, folder / dtype / "trace", CODE_TOKENS)
        trainers[dtype] = Trainer(checkpoint, dtype, folder / dtype / "trace")
    clean = conclude({d: t.inside() for d, t in trainers.items()}, ("bfloat16", "bfloat16"), routers=False)
    print("unaltered:", "; ".join(f"{d} {c.code} ({c.score:.2f})" for d, c in clean.dtypes.items()), flush=True)
    for fault in FAULTS:
        for strength in fault.strengths if fault.windowed == windowed else ():
            answers = code_answers(trainers, fault, strength)
            cells = "; ".join(f"{dtype} {answer}" for dtype, answer in answers.items())
            print(f"{fault.name} {strength:g}: {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Built-in name or folder; a tiny random Llama where it is left out.")
    parser.add_argument("--sample", type=int, help="So many weights, drawn at random; all where it is left out.")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--code", action="store_true", help="Faults in the code of layers instead of in weights.")
    options = parser.parse_args()
    if options.code:
        _code(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = resolve(options.model).path if options.model else _tiny(Path(folder) / "model")
        for dtype in options.dtypes.split(","):
            traced = Path(folder) / f"trace-{dtype}"
            trace(checkpoint, dtype, traced)
            trainer = Trainer(checkpoint, dtype, traced)
            clean = trainer.locate()
            print(f"{dtype}: unaltered: {clean.verdict}, largest score {clean.score:.2f}", flush=True)
            weights = list(trainer.weights)
            if options.sample:
                weights = np.random.default_rng(0).choice(weights, options.sample, replace=False).tolist()
            for size in map(float, options.sizes.split(",")):
                found = accuracy(trainer, weights, size)
                print(
                    f"{dtype:<9} {100 * size:>6.2f} %  module {found.module}/{found.cases}  layer "
                    f"{found.layer}/{found.cases}",
                    flush=True,
                )


def _code(options: argparse.Namespace) -> None:
    from tests.real.tiny import GROUPED, save_model

    dtypes = options.dtypes.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if options.model:
            path = resolve(options.model).path
            code_grid(path, Path(folder), dtypes, windowed=bool(read_config(str(path)).get("sliding_window")))
            return
        code_grid(_tiny(Path(folder) / "llama"), Path(folder) / "traces-llama", dtypes, windowed=False)
        windowed = save_model("MistralConfig", {**GROUPED, "sliding_window": WINDOW}, Path(folder) / "mistral")
        code_grid(windowed, Path(folder) / "traces-mistral", dtypes, windowed=True)


def _tiny(folder: Path) -> Path:
    from tests.real.tiny import save_tiny

    return save_tiny("llama", folder)


if __name__ == "__main__":
    main()
