"""Drop-in tensor-parallel layers: full sizes in the constructor, sharded parameters inside, plain tensors out.

``group=None`` is the default tensor-parallel group, or world size 1 where none was initialised.
"""

from tp_kernels.layers.attention import ParallelAttention
from tp_kernels.layers.base import (
    TensorParallelLayer,
    TensorShard,
    full_gradients,
    full_state_dict,
    iter_tensor_shards,
    load_full_state_dict,
)
from tp_kernels.layers.clipping import clip_grad_norm_
from tp_kernels.layers.cross_entropy import vocab_parallel_cross_entropy
from tp_kernels.layers.decoder import ParallelDecoderLayer
from tp_kernels.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tp_kernels.layers.kv_cache import LayerKVCache
from tp_kernels.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from tp_kernels.layers.mlp import ParallelMLP
from tp_kernels.layers.norm import RMSNorm
from tp_kernels.layers.qkv import QKVParallelLinear
from tp_kernels.layers.quantized import quantize_model
from tp_kernels.layers.rotary import RotaryEmbedding

__all__ = [
    "ColumnParallelLinear",
    "LayerKVCache",
    "MergedColumnParallelLinear",
    "ParallelAttention",
    "ParallelDecoderLayer",
    "ParallelLMHead",
    "ParallelMLP",
    "QKVParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "TensorParallelLayer",
    "TensorShard",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "full_gradients",
    "full_state_dict",
    "iter_tensor_shards",
    "load_full_state_dict",
    "quantize_model",
    "vocab_parallel_cross_entropy",
]
