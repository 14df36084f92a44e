"""Whether every number of a forecast can stand in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from mismatch_probe.metrics.length_prediction import LengthForecast


def assert_strict(found: LengthForecast) -> None:
    """No value of a fit or a prediction is NaN or infinite."""
    fit = found.fit
    values = [fit.variance_exponent, fit.variance_ratio, fit.mean, *found.crossings.values()]
    values += [value for prediction in (*found.predictions, *found.curve) for value in prediction.values.values()]
    json.dumps([asdict(value) for value in values] + [fit.model_weight, fit.trend_weight], allow_nan=False)
