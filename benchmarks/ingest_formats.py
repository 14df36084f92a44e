"""Response tokens per second that reading a dump takes in, by format, from files to `recorded.parquet`.

python benchmarks/ingest_formats.py
python benchmarks/ingest_formats.py --tokens 2000000 slime verl
"""

from __future__ import annotations

import json
import pickle
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mismatch_probe.ingest.read import ReadOptions, read_dump

PROMPT, RESPONSE = 200, 1000
Maker = Callable[[Path, int], None]


def _values(n: int, width: int, seed: int = 0) -> Any:
    """`[n, width]` ids and two log-probs."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 150_000, (n, width))
    rollout = -rng.exponential(0.6, (n, width)).astype(np.float32)
    return ids, rollout, rollout - rng.normal(0, 0.01, (n, width)).astype(np.float32)


def _tensors(**arrays: Any) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def slime(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    samples = [
        {
            "index": index,
            "tokens": ids[index].tolist(),
            "response_length": RESPONSE,
            "rollout_log_probs": rollout[index, PROMPT:].astype(float).tolist(),
            "loss_mask": [1] * RESPONSE,
        }
        for index in range(n)
    ]
    scores = [{"sample_index": index, "log_probs": torch.from_numpy(trainer[index, PROMPT:])} for index in range(n)]
    for name, value in (("rollout", {"rollout_id": 0}), ("train", {"format_version": 2})):
        (folder / f"{name}_data").mkdir()
        torch.save(value | {"samples": samples if name == "rollout" else scores}, folder / f"{name}_data/0.pt")


def verl(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    fields = _tensors(
        prompts=ids[:, :PROMPT],
        responses=ids[:, PROMPT:],
        response_mask=np.ones((n, RESPONSE), np.int64),
        attention_mask=np.ones_like(ids),
        rollout_log_probs=rollout[:, PROMPT:],
        old_log_probs=trainer[:, PROMPT:],
    )
    torch.save(fields, folder / "x.pt")


def skyrl(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    ones = np.ones((n, RESPONSE), np.float32)
    sides = {"rollout_logprobs": rollout[:, PROMPT:], "action_log_probs": trainer[:, PROMPT:]}
    fields = {"sequences": ids, "attention_mask": np.ones_like(ids), "loss_mask": ones, "response_mask": ones, **sides}
    (folder / "x.pkl").write_bytes(pickle.dumps(fields))


def openrlhf(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    mask = np.arange(1, PROMPT + RESPONSE)[None].repeat(n, 0) >= PROMPT
    sides = {"rollout_log_probs": rollout[:, 1:], "action_log_probs": trainer[:, 1:]}
    torch.save(_tensors(sequences=ids, attention_mask=np.ones_like(ids), action_mask=mask, **sides), folder / "x.pt")


def trl(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    fields = _tensors(
        prompt_ids=ids[:, :PROMPT],
        prompt_mask=np.ones((n, PROMPT), np.int64),
        completion_ids=ids[:, PROMPT:],
        completion_mask=np.ones((n, RESPONSE), np.int64),
        sampling_per_token_logps=rollout[:, PROMPT:],
        old_per_token_logps=trainer[:, PROMPT:],
    )
    torch.save(fields, folder / "x.pt")


def _sampled(n: int) -> Any:
    return (np.arange(PROMPT + RESPONSE)[None].repeat(n, 0) >= PROMPT).astype(np.int64)


def trl_async(folder: Path, n: int) -> None:
    ids, rollout, _ = _values(n, PROMPT + RESPONSE)
    masks = _sampled(n)
    samples = [
        {"input_ids": a, "completion_mask": b, "old_log_probs": c, "model_version": 3}
        for a, b, c in zip(ids, masks, rollout, strict=True)
    ]
    (folder / "x.pkl").write_bytes(pickle.dumps(samples))


def roll(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    sides = {"infer_logprobs": rollout[:, 1:], "old_log_probs": trainer[:, 1:]}
    masks = {"attention_mask": np.ones_like(ids), "response_mask": _sampled(n)}
    torch.save(_tensors(input_ids=ids, **masks, **sides), folder / "x.pt")


def pipelinerl(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    labels = np.where(_sampled(n) != 0, ids, -100)
    packed = {"input_ids": ids, "labels": labels, "old_logprobs": rollout, "ref_logprobs": trainer}
    fields = _tensors(**{key: value.reshape(1, -1) for key, value in packed.items()})
    torch.save(fields | {"seq_boundaries": torch.arange(n + 1) * (PROMPT + RESPONSE)}, folder / "x.pt")


def areal(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, PROMPT + RESPONSE)
    fields = {"loss_mask": _sampled(n), "versions": np.zeros_like(ids), "logprobs": rollout, "prox_logp": trainer}
    torch.save(_tensors(input_ids=ids, **fields), folder / "x.pt")


def tinker(folder: Path, n: int) -> None:
    ids, rollout, _ = _values(n, PROMPT + RESPONSE + 1)
    with (folder / "x.jsonl").open("w") as handle:
        for a, b in zip(ids.tolist(), rollout.astype(float).tolist(), strict=True):
            inputs = {"target_tokens": a[1:], "logprobs": b[1:], "mask": _sampled(1)[0].tolist()}
            handle.write(json.dumps({"model_input": a[:-1], "loss_fn_inputs": inputs}) + "\n")


def _bits(value: float) -> str:
    return f"f32:{struct.pack('>f', value).hex()}"


def martingale(folder: Path, n: int) -> None:
    ids, rollout, trainer = _values(n, RESPONSE)
    with sqlite3.connect(folder / "tokens.db") as database:
        database.executescript(
            "CREATE TABLE llm_revisions (digest TEXT PRIMARY KEY, step INTEGER);"
            "CREATE TABLE sequences (actor_id INTEGER, sequence_index INTEGER, digest TEXT UNIQUE, record_json TEXT);"
            "CREATE TABLE scores (sequence_digest TEXT, position INTEGER, train_revision_digest TEXT, record_json TEXT,"
            " PRIMARY KEY (sequence_digest, position, train_revision_digest));"
            "INSERT INTO llm_revisions VALUES ('r', 1);"
        )
        for index in range(n):
            tokens = [
                {
                    "revision_digest": "r",
                    "position": place,
                    "token_id": one,
                    "logprob_bits": _bits(b),
                    "digest": "0" * 64,
                }
                for place, (one, b) in enumerate(zip(ids[index].tolist(), rollout[index].tolist(), strict=True))
            ]
            record = json.dumps({"prompt_digest": "p", "tokens": tokens})
            database.execute("INSERT INTO sequences VALUES (0, ?, ?, ?)", (index, f"s{index}", record))
            scores = [
                (f"s{index}", place, "r", json.dumps({"logprob_bits": _bits(a), "digest": "0" * 64}))
                for place, a in enumerate(trainer[index].tolist())
            ]
            database.executemany("INSERT INTO scores VALUES (?, ?, ?, ?)", scores)
    database.close()


def _lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        for record in records:
            handle.write(json.dumps(record) + "\n")


def _rows(n: int) -> Iterator[tuple[list[int], list[int], list[float], list[float]]]:
    """Prompt, response and the log-probs of both sides, with the seven digits of a float32."""
    for ids, rollout, trainer in zip(*_values(n, PROMPT + RESPONSE), strict=True):
        b, a = ([float(f"{value:.7g}") for value in side[PROMPT:].tolist()] for side in (rollout, trainer))
        yield ids[:PROMPT].tolist(), ids[PROMPT:].tolist(), b, a


def nemo_rl(folder: Path, n: int) -> None:
    zeros = [0.0] * PROMPT
    records = (
        {
            "token_ids": [x + y],
            "input_lengths": [PROMPT + RESPONSE],
            "token_loss_mask": [[0] * PROMPT + [1] * RESPONSE],
            "sample_loss_mask": [1.0],
            "generation_logprobs": [zeros + b],
            "prev_logprobs": [zeros + a],
            "rewards": [1.0],
            "advantages": [zeros + [1.0] * RESPONSE],
            "idx": 0,
        }
        for x, y, b, a in _rows(n)
    )
    _lines(folder / "train_data_step1.jsonl", records)


def prime_rl(folder: Path, n: int) -> None:
    zeros = [0.0] * PROMPT
    records = (
        {
            "schema_version": 1,
            "step": 0,
            "rank": 0,
            "micro_step": 0,
            "micro_sequence_idx": 0,
            "export_sequence_idx": index,
            "token_ids": x + y,
            "position_ids": list(range(PROMPT + RESPONSE)),
            "loss_mask": [False] * PROMPT + [True] * RESPONSE,
            "advantages": zeros + [1.0] * RESPONSE,
            "inference_logprobs": zeros + b,
            "trainer_logprobs": zeros + a,
            "entropy": zeros + [0.5] * RESPONSE,
        }
        for index, (x, y, b, a) in enumerate(_rows(n))
    )
    _lines(folder / "step_0/rank_0.jsonl", records)
    (folder / "step_0/STABLE").touch()


def open_instruct(folder: Path, n: int) -> None:
    records = (
        {"step": 0, "sample_idx": i, "prompt_idx": i, "prompt_tokens": x, "response_tokens": y, "logprobs": b}
        | {"reward": 1.0, "finish_reason": "stop"}
        for i, (x, y, b, _) in enumerate(_rows(n))
    )
    _lines(folder / "run_rollouts_000000.jsonl", records)


def torchtitan(folder: Path, n: int) -> None:
    records = (
        {
            "group_id": i,
            "rollout_id": i,
            "status": "completed",
            "reward": 1.0,
            "turns": [{"prompt_token_ids": x, "completion_token_ids": y, "completion_logprobs": b}],
        }
        for i, (x, y, b, _) in enumerate(_rows(n))
    )
    _lines(folder / "rollout_samples.jsonl", records)


def verifiers(folder: Path, n: int) -> None:
    records = ({"prompt_ids": x, "completion_ids": y, "completion_logprobs": b} for x, y, b, _ in _rows(n))
    _lines(folder / "x.jsonl", records)


def nemo_gym(folder: Path, n: int) -> None:
    keys = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
    _lines(folder / "x.jsonl", (dict(zip(keys, row, strict=False)) for row in _rows(n)))


def vllm(folder: Path, n: int) -> None:
    def answer(prompt: list[int], ids: list[int], logprobs: list[float]) -> dict[str, Any]:
        found = {"token_logprobs": logprobs, "tokens": [f"token_id:{one}" for one in ids], "top_logprobs": []}
        choice = {"index": 0, "logprobs": found, "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": prompt}
        return {"object": "text_completion", "choices": [choice]}

    _lines(folder / "x.jsonl", (answer(x, y, b) for x, y, b, _ in _rows(n)))


def sglang(folder: Path, n: int) -> None:
    def answer(prompt: list[int], ids: list[int], logprobs: list[float]) -> dict[str, Any]:
        given = [[None, one, None] for one in prompt]
        found = [[b, one, None] for b, one in zip(logprobs, ids, strict=True)]
        meta = {"input_token_logprobs": given, "output_token_logprobs": found, "finish_reason": {"type": "stop"}}
        return {"text": "", "output_ids": ids, "meta_info": meta}

    _lines(folder / "x.jsonl", (answer(x, y, b) for x, y, b, _ in _rows(n)))


def token_difr(folder: Path, n: int) -> None:
    samples = [{"prompt_token_ids": x, "outputs": [{"token_ids": y}]} for x, y, _, _ in _rows(n)]
    (folder / "x.json").write_text(json.dumps({"config": {}, "samples": samples}))


MAKERS: dict[str, Maker] = {
    "areal": areal,
    "martingale": martingale,
    "nemo-gym": nemo_gym,
    "nemo-rl": nemo_rl,
    "open-instruct": open_instruct,
    "openrlhf": openrlhf,
    "pipelinerl": pipelinerl,
    "prime-rl": prime_rl,
    "roll": roll,
    "sglang": sglang,
    "skyrl": skyrl,
    "slime": slime,
    "tinker": tinker,
    "token-difr": token_difr,
    "torchtitan": torchtitan,
    "trl": trl,
    "trl-async": trl_async,
    "verifiers": verifiers,
    "verl": verl,
    "vllm": vllm,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(MAKERS)))
@click.option("--tokens", default=1_000_000, help="Response tokens per format.")
def main(names: tuple[str, ...], tokens: int) -> None:
    """Makes a dump per format and reads it."""
    for name in names or sorted(MAKERS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dump"
            path.mkdir()
            MAKERS[name](path, max(1, tokens // RESPONSE))
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            start = time.perf_counter()
            recorded = read_dump(path, Path(folder) / "out.parquet", ReadOptions(trust_pickle=True))
            seconds = time.perf_counter() - start
            assert recorded.file.format == name
            said = f"{recorded.file.n_tokens / seconds:12,.0f} tokens/s {size / (1 << 20):8.1f} MiB"
            click.echo(f"{name:14} {said}")


if __name__ == "__main__":
    main()
