"""Settings of the commands that begin with a comparison, composed of the groups."""

from __future__ import annotations

from mismatch_probe.config.compare import (
    AnalysisSettings,
    CheckpointSettings,
    CompareConfig,
    DumpSettings,
    GateSettings,
    MeasurementSettings,
    ModelSettings,
    PolicySettings,
    PromptSettings,
    RecordedSettings,
    RequestSettings,
    RolloutDtypes,
    RolloutEngine,
    RolloutSettings,
    TrainerAttention,
    TrainerSettings,
)
from mismatch_probe.config.probes import (
    AttributeOptions,
    AuditOptions,
    BaselineSettings,
    ExperimentSettings,
    GradientOptions,
)


class CompareSettings(GateSettings, CompareConfig):
    """Settings of `compare`."""


class ReportSettings(GateSettings, AnalysisSettings):
    """Settings of `report`."""


class AttributeSettings(
    AttributeOptions, MeasurementSettings, TrainerSettings, RolloutSettings, PromptSettings, ModelSettings
):
    """Settings of `attribute`; its dtypes are those of the pair."""


class AuditSettings(
    BaselineSettings,
    AuditOptions,
    MeasurementSettings,
    TrainerSettings,
    RolloutSettings,
    RecordedSettings,
    PolicySettings,
    PromptSettings,
    ModelSettings,
):
    """Settings of `audit`."""


class GradientSettings(
    GradientOptions,
    MeasurementSettings,
    TrainerSettings,
    RolloutSettings,
    RecordedSettings,
    PolicySettings,
    PromptSettings,
    ModelSettings,
):
    """Settings of `rl gradient`."""


class PreflightSettings(TrainerAttention, RolloutEngine, RolloutDtypes, RequestSettings, CheckpointSettings):
    """Settings of `preflight`."""


class DiagnoseSettings(ExperimentSettings, CheckpointSettings, DumpSettings):
    """Settings of `diagnose`."""
