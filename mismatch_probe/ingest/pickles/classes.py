"""The keys of what frameworks pickle: dicts, objects of their own classes, and batches that encode their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mismatch_probe.ingest.pickles.machine import PickleError, StandIn
from mismatch_probe.ingest.pickles.rebuild import decoded, kind_of, load_bytes

Fields = dict[str, Any]
_USER_DICTS = ("BatchEncoding", "BatchFeature", "UserDict")
_TENSOR_KEYS = {"data", "shape", "dtype"}


def fields_of(value: Any) -> Fields | None:
    """The keys of a dict or of an object; None where it has none.

    Raises:
        PickleError: It is of a known class, and not as that class writes it.
    """
    if isinstance(value, Mapping):
        return {key: one for key, one in value.items() if type(key) is str}
    if type(value) is not StandIn:
        return None
    if value.made_by.name == "DataProto":
        return _data_proto(value.state)
    state = value.state
    if value.made_by.name == "_rebuild_tensor_batch" and len(value.args) == 2:
        state = value.args[1]
    if type(state) is tuple and len(state) == 2:  # a __dict__, and what __slots__ name
        state = (state[0] or {}) | (state[1] or {})
    if type(state) is dict and type(state.get("__dict__")) is dict:  # pydantic
        state = state["__dict__"]
    if value.made_by.name in _USER_DICTS and type(state) is dict and type(state.get("data")) is dict:
        state = state["data"]
    if type(state) is dict and type(state.get("batch_dict")) is dict:
        return _tensor_batch(state)
    found = value.items | (state if type(state) is dict else {})
    return {key: one for key, one in found.items() if type(key) is str} or None


def _data_proto(state: Any) -> Fields:
    """verl's and ROLL's batch: tensors as the bytes of a torch file or encoded one by one, lists, and information.

    Source: `verl/protocol.py` (0.9.1), `DataProto.__getstate__`.
    """
    if type(state) is not tuple or len(state) != 3:
        raise PickleError("it has a DataProto without a state")
    batch, others, information = state
    if type(batch) is bytes:
        batch = fields_of(load_bytes(batch))
    elif type(batch) is tuple:
        batch = {key: _encoded(value) for key, value in batch[2].items()}
    return (batch or {}) | (others or {}) | {"meta_info": information}


def _encoded(value: Any) -> Any:
    """`(type, shape, bytes)` of a tensor, or `(layout, list of these)` of a nested one."""
    if len(value) == 2:
        return [_encoded(one) for one in value[1]]
    kind, shape, data = value
    return decoded(bytes(data), kind_of(kind)).reshape(shape)


def _tensor_batch(state: Mapping[str, Any]) -> Fields:
    """SkyRL's batch. Source: `skyrl/backends/skyrl_train/training_batch.py` (0446435)."""
    fields = {key: _skyrl_tensor(value) for key, value in state["batch_dict"].items() if type(key) is str}
    return fields | {"metadata": state.get("metadata")}


def _skyrl_tensor(value: Any) -> Any:
    if type(value) is not dict:
        return value
    if value.get("format") == "torch":
        return load_bytes(value["data"])
    if not value.keys() >= _TENSOR_KEYS:
        return None  # a list of images, which no reader needs
    kind = np.dtype(value["dtype"]) if type(value["dtype"]) is str else np.dtype(object)
    if kind.kind not in "biuf":
        raise PickleError("it has a tensor of a type that is not read")
    return np.frombuffer(value["data"], kind).reshape(value["shape"])
