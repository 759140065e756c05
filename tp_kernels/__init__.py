"""Fused kernels and overlapped communication for tensor-parallel transformers, as drop-in PyTorch modules.

Public names are loaded when first used, so that importing the package imports neither torch nor anything heavy.
"""

import importlib

from tp_kernels import _native  # noqa: F401  (a missing native core is an error here, with the cure in its text)
from tp_kernels.version import __version__

_HOMES = {
    "tp_kernels.comm": [
        "CommError",
        "CommMismatchError",
        "CommTimeoutError",
        "ProcessGroupManager",
        "TPGroup",
        "get_tp_group",
        "init",
        "shutdown",
    ],
    "tp_kernels.layers": [
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "ParallelAttention",
        "ParallelDecoderLayer",
        "ParallelLMHead",
        "ParallelMLP",
        "QKVParallelLinear",
        "RMSNorm",
        "RowParallelLinear",
        "VocabParallelEmbedding",
        "full_state_dict",
        "load_full_state_dict",
        "vocab_parallel_cross_entropy",
    ],
    "tp_kernels.checkpoint": ["CheckpointError", "DistributedCheckpointLoader", "load_model"],
    "tp_kernels.models": ["ModelConfig", "ParallelCausalLM"],
    "tp_kernels.inference": ["GenerationResult", "generate", "load_tokenizer"],
    "tp_kernels.integrations": ["apply_tp_kernels", "from_pretrained"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBMODULES = ("checkpoint", "comm", "inference", "integrations", "layers", "models", "ops", "planning", "testing")

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str):
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"tp_kernels.{name}")
    else:
        raise AttributeError(f"module 'tp_kernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__, *_SUBMODULES])
