"""Functional kernels: torch tensors in and out, no groups, no modules.

Every op has ``<op>_reference`` beside it: plain PyTorch, the test oracle, the path that autograd records, and what runs
where no faster path was measured.
"""

from tp_kernels.ops._explain import Path, explain
from tp_kernels.ops.all_reduce_norm import all_reduce_add_rms_norm, all_reduce_add_rms_norm_reference
from tp_kernels.ops.attention import attention, attention_reference
from tp_kernels.ops.column_parallel_linear import (
    choose_column_parallel_linear,
    column_parallel_linear,
    column_parallel_linear_reference,
)
from tp_kernels.ops.cpu_weights import advise_huge
from tp_kernels.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_backward_reference,
    cross_entropy_reference,
    cross_entropy_stats,
    cross_entropy_stats_reference,
)
from tp_kernels.ops.decode_attention import decode_attention, decode_attention_reference
from tp_kernels.ops.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_varlen,
    flash_attention_varlen_reference,
)
from tp_kernels.ops.linear import linear, linear_reference
from tp_kernels.ops.linear_all_reduce import (
    choose_linear_all_reduce,
    linear_all_reduce,
    linear_all_reduce_reference,
)
from tp_kernels.ops.linear_reduce_scatter import (
    choose_linear_reduce_scatter,
    linear_reduce_scatter,
    linear_reduce_scatter_reference,
)
from tp_kernels.ops.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tp_kernels.ops.norm_linear import (
    norm_linear,
    norm_linear_reference,
    norm_swiglu_linear,
    norm_swiglu_linear_reference,
)
from tp_kernels.ops.qkv import qkv_rope_cache, qkv_rope_cache_reference
from tp_kernels.ops.quantize import dequantize_weight, dequantize_weight_reference, quantize_weight
from tp_kernels.ops.rope import apply_rope, apply_rope_reference
from tp_kernels.ops.swiglu import silu_mul, silu_mul_reference, swiglu_linear, swiglu_linear_reference
from tp_kernels.ops.swiglu_mlp import swiglu_mlp, swiglu_mlp_reference

__all__ = [
    "Path",
    "add_rms_norm",
    "add_rms_norm_reference",
    "advise_huge",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_reference",
    "apply_rope",
    "apply_rope_reference",
    "attention",
    "attention_reference",
    "choose_column_parallel_linear",
    "choose_linear_all_reduce",
    "choose_linear_reduce_scatter",
    "column_parallel_linear",
    "column_parallel_linear_reference",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_reference",
    "cross_entropy_reference",
    "cross_entropy_stats",
    "cross_entropy_stats_reference",
    "decode_attention",
    "decode_attention_reference",
    "dequantize_weight",
    "dequantize_weight_reference",
    "explain",
    "flash_attention",
    "flash_attention_reference",
    "flash_attention_varlen",
    "flash_attention_varlen_reference",
    "linear",
    "linear_all_reduce",
    "linear_all_reduce_reference",
    "linear_reduce_scatter",
    "linear_reduce_scatter_reference",
    "linear_reference",
    "norm_linear",
    "norm_linear_reference",
    "norm_swiglu_linear",
    "norm_swiglu_linear_reference",
    "qkv_rope_cache",
    "qkv_rope_cache_reference",
    "quantize_weight",
    "rms_norm",
    "rms_norm_reference",
    "silu_mul",
    "silu_mul_reference",
    "swiglu_linear",
    "swiglu_linear_reference",
    "swiglu_mlp",
    "swiglu_mlp_reference",
]
