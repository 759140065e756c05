"""Checkpoints: which slice a rank owns, and readers that fetch only that slice.

Everything is imported on first use, because ``sharding`` is a leaf that the layers import while the loader imports the
layers.
"""

from __future__ import annotations

import importlib

# public name -> submodule that defines it
_EXPORTS = {
    "CheckpointError": "errors",
    "DistributedCheckpointLoader": "loader",
    "HeadShard": "sharding",
    "kv_replicas": "sharding",
    "load_model": "model_loading",
    "shard_heads": "sharding",
    "shard_range": "sharding",
    "shard_vocab": "sharding",
    "shard_width": "sharding",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
