"""The fault bench: recorded runs of real engines with one known fault each, and clean ones beside them.

`python -m validation.faults make OUT` writes `OUT/CASE.jsonl` in the generic format and `OUT/truth.json`;
`python -m validation.faults list` prints what it would make.

A *recording* is what vLLM sampled, made once (`record`). A *score* is a trainer's forward pass over it, right or wrong
in a stated way (`trainer`). A *case* (`catalog`) is made of both by pure functions on rows (`edits`). Where the engine
has other weights than the trainer, it samples from them (`weights`).
"""
