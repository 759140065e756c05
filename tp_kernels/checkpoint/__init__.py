"""Checkpoints: which slice a rank owns, and readers that fetch only that slice.

Everything is imported on first use, because ``sharding`` is a leaf that the layers import while the loader imports the
layers.
"""

from tp_kernels._lazy import lazy

_HOMES = {
    "errors": ["CheckpointError"],
    "loader": ["DistributedCheckpointLoader"],
    "sharding": ["HeadShard", "kv_replicas", "shard_heads", "shard_range", "shard_vocab", "shard_width"],
    "model_loading": ["load_model"],
}

__all__ = [name for names in _HOMES.values() for name in names]

__getattr__, __dir__ = lazy(__name__, _HOMES)
