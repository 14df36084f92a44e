"""`mismatch-probe rl`: a group of commands."""

from __future__ import annotations

import click

from mismatch_probe.cli.lazy import LazyGroup

_COMMANDS = {
    "demo": "Does rounding alone harm training? Ten minutes.",
    "run": "One RL run, instrumented at every step.",
    "sweep": "A grid of runs: precision, algorithm, stress, seed.",
    "report": "A sweep's page again, with your own model placed on it.",
    "sanity-set": "The problems that a model solves sometimes, which RL must be able to learn.",
    "gradient": "The policy gradient of a batch under each correction, without an RL run.",
}


@click.group(cls=LazyGroup, modules=_COMMANDS, prefix="rl_")
def command() -> None:
    """What does the mismatch do to training?

    \b
    Examples:
      mismatch-probe rl run --rollout-dtype fp16 --trainer-dtype fp16 --steps 50
      mismatch-probe rl gradient --model ./my-checkpoint
    """
