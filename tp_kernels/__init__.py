"""Fused kernels and overlapped communication for tensor-parallel transformers, as drop-in PyTorch modules.

Public names are loaded when first used, so that importing the package imports neither torch nor anything heavy.
"""

from tp_kernels import _native  # noqa: F401  (a missing native core is an error here, with the cure in its text)
from tp_kernels._lazy import lazy
from tp_kernels.version import __version__

_HOMES = {
    "comm": [
        "CommError",
        "CommMismatchError",
        "CommTimeoutError",
        "ProcessGroupManager",
        "TPGroup",
        "get_tp_group",
        "init",
        "shutdown",
    ],
    "layers": [
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
    "checkpoint": ["CheckpointError", "DistributedCheckpointLoader", "load_model"],
    "models": ["ModelConfig", "ParallelCausalLM"],
    "inference": ["GenerationResult", "generate", "load_tokenizer"],
    "integrations": ["apply_tp_kernels", "from_pretrained"],
}
_SUBMODULES = ("checkpoint", "comm", "inference", "integrations", "layers", "models", "ops", "planning", "testing")

__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]

__getattr__, __dir__ = lazy(__name__, _HOMES, _SUBMODULES)
