"""What a pass has to read and compute, from the model's sizes alone, and what was aimed for on an H100.

    prefill   2 operations for each weight of the layers and each token; the head for the last token alone, because
              that is all a prompt needs; 4 for each pair of a query and a key it may see, times head size
    decode    all cached keys and values a row
    either    every weight but the embedding once, of the embedding a row a token

What activations move is left out: it is small beside that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tp_kernels.testing.op_bench.shapes import ARCHITECTURES, Shapes

__all__ = ["GOALS", "Goal", "goal_of", "kv_bytes", "prefill_flops", "weight_bytes"]


@dataclass(frozen=True)
class Goal:
    """A figure to reach: at most ``limit``, milliseconds or a ratio to the same ranks without communication.

    Attributes:
        measure: "ms" or "over_off".
        what: "prefill" (of 4096 tokens) or "decode" (batch 1).
    """

    model: str
    what: str
    tp: int
    shard: int
    quantize: str
    measure: str
    limit: float


# For one H100 80GB HBM3, four ranks sharing it, and bf16; what they were set against is in docs/performance.md.
GOALS = (
    Goal("llama3-8b", "decode", 1, 1, "none", "ms", 5.3),
    Goal("llama3-8b", "decode", 1, 4, "none", "ms", 1.6),
    Goal("llama3-8b", "decode", 1, 1, "int8", "ms", 3.4),
    Goal("llama3-8b", "prefill", 1, 1, "none", "ms", 96.0),
    Goal("llama3-8b", "prefill", 1, 4, "none", "ms", 27.0),
    Goal("llama3-8b", "decode", 4, 1, "none", "over_off", 1.15),
    Goal("llama3-8b", "prefill", 4, 1, "none", "over_off", 1.05),
)
_GOAL_TOKENS, _GOAL_CONTEXT = 4096, 1024


def goal_of(
    gpu: str,
    model: str,
    what: str,
    *,
    tp: int,
    shard: int,
    ranks_per_gpu: int,
    quantize: str,
    dtype: str,
    layers: int,
    batch: int,
    tokens: int,
    context: int,
) -> Goal | None:
    """The goal of one case, None if there is none for it.

    Args:
        gpu: its name, as torch says it.
        ranks_per_gpu: goals of several ranks are for ranks on one GPU.
        layers: of the model that is measured; only the whole model has a goal.
        tokens, context: of the prompt, 4096, and cached before a decode step, 1024.
    """
    if "H100" not in gpu or "HBM3" not in gpu or ranks_per_gpu != tp:  # others of that name have other memory
        return None
    if dtype != "bfloat16" or batch != 1 or layers != ARCHITECTURES[model].layers:
        return None
    if (what == "prefill" and tokens != _GOAL_TOKENS) or (what == "decode" and context != _GOAL_CONTEXT):
        return None
    wanted = (model, what, tp, shard, quantize)
    return next((g for g in GOALS if (g.model, g.what, g.tp, g.shard, g.quantize) == wanted), None)


def prefill_flops(shapes: Shapes, layers: int, batch: int, tokens: int) -> int:
    """Operations of ``batch`` prompts of ``tokens`` tokens, on one rank of these (sharded) sizes."""
    q, kv = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    weights = layers * shapes.hidden * (2 * q + 2 * kv + 3 * shapes.intermediate)
    seen = tokens * (tokens + 1) // 2
    return batch * (2 * weights * tokens + 2 * shapes.hidden * shapes.vocab + 4 * layers * q * seen)


def kv_bytes(shapes: Shapes, layers: int, batch: int, context: int, itemsize: int) -> int:
    """Bytes of the keys and values of ``batch`` rows of ``context`` tokens, on one rank of these sizes."""
    return 2 * layers * batch * context * shapes.kv_heads * shapes.head_dim * itemsize


def weight_bytes(tensors: Iterable[torch.Tensor], embed: torch.Tensor, tokens: int) -> int:
    """Bytes of weights that a pass of ``tokens`` new tokens, over all rows, reads.

    Args:
        tensors: all weights and their scales; one that occurs twice is counted once.
        embed: the embedding, one of them, of which only a row for each token is read.
        tokens: new ones.
    """
    each = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    rows = tokens * embed.shape[1] * embed.element_size()
    return sum(each.values()) + rows - each[embed.data_ptr()]
