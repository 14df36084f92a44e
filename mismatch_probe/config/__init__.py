"""Settings: a pydantic model per group, of which every command composes its own. Imports no engine."""

from mismatch_probe.config.compare import DEFAULT_MODEL, CompareConfig, DumpSettings, Sizes, check_lengths
from mismatch_probe.config.engine_args import FORBIDDEN_ENGINE_ARGS, OWNED_ENGINE_ARGS, engine_args_of
from mismatch_probe.config.limits import RECORDED, Limit
from mismatch_probe.config.probes import AttributeOptions, AuditOptions, GradientOptions
from mismatch_probe.config.settings import Settings, flag

__all__ = [
    "DEFAULT_MODEL",
    "FORBIDDEN_ENGINE_ARGS",
    "OWNED_ENGINE_ARGS",
    "RECORDED",
    "AttributeOptions",
    "AuditOptions",
    "CompareConfig",
    "DumpSettings",
    "GradientOptions",
    "Limit",
    "Settings",
    "Sizes",
    "check_lengths",
    "engine_args_of",
    "flag",
]
