"""All-reduce + residual + RMSNorm in one kernel against the best that can be put together from separate ones.

The part of ``tp-kernels bench all-reduce-gpu`` about norms of [tokens, hidden]. First every separate norm (ours,
``F.rms_norm``, torch.compile, Liger where installed) and every all-reduce of torch (one-shot and two-shot over peer
memory, NCCL) is timed by itself; the two fastest of each are then put together, and these four are the peers. In turns
with them: ``all_reduce`` as ours chooses it, ``all_reduce_same`` where the fused kernel takes another algorithm,
``all_reduce_norm`` (ours, one after the other), ``fused`` as decoder layers call it (sums not gathered),
``fused_gathered``, and up to 64 tokens ``fused_triton``, the kernel that stands in where the CUDA ones were not built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.comm.symmetric_sizes import algorithm_for, norm_algorithm_for
from tp_kernels.testing.bench import Timing

__all__ = ["NormBench", "choose_peers", "norm_rows", "separate_norms"]

EPS = 1e-6
TRITON_TOKENS = 64  # every rank normalises all rows: nothing for prefill
_FIRST_ROUNDS = 3

Norm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def separate_norms() -> dict[str, Norm]:
    """``norm(x, residual, weight) -> (normed, sum)`` by name, compiled ones anew."""

    def of_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, weight.shape, weight, EPS), summed

    found: dict[str, Norm] = {
        "add_rms_norm": partial(ops.add_rms_norm, eps=EPS),
        "F.rms_norm": of_torch,
        "torch.compile": torch.compile(of_torch),
    }
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Liger
    except ImportError:
        return found
    found["liger"] = lambda x, residual, weight: Liger.apply(x, residual, weight, EPS, 0.0, "llama", False)
    return found


def choose_peers(reduces: Mapping[str, Timing], norms: Mapping[str, Timing], most: int = 2) -> list[tuple[str, str]]:
    """The all-reduces and norms to put together: every pair of the ``most`` fastest, the most promising first."""
    fastest = [sorted(of, key=lambda name, of=of: of[name].median)[:most] for of in (reduces, norms)]
    return sorted(product(*fastest), key=lambda pair: reduces[pair[0]].median + norms[pair[1]].median)


def norm_rows(common: Mapping[str, Any], timed: Mapping[str, Timing], wrong: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row for each way.

    ``over_all_reduce`` is its time over that of our all-reduce by itself, of the algorithm that the fused kernel takes;
    ``speedup`` the time of the fastest right peer, an all-reduce of torch's and then a norm, over its own.

    Args:
        timed: ours under their names, peers as "all-reduce+norm", torch's all-reduces by themselves under theirs.
    """
    peers = [name for name in timed if "+" in name and not wrong.get(name)]
    best = min(peers, key=lambda name: timed[name].median, default=None)
    alone = timed["all_reduce_same" if "all_reduce_same" in timed else "all_reduce"].median
    rows = []
    for path, timing in timed.items():
        rows.append(
            {
                **common,
                "path": path,
                "time_us": _us(timing.median),
                "q20_us": _us(timing.q20),
                "q80_us": _us(timing.q80),
                "busbw": "",
                "over_peer": "",
                "over_all_reduce": round(timing.median / alone, 3),
                "speedup": "" if best is None else round(timed[best].median / timing.median, 3),
                "best_peer": best or "",
                "wrong": wrong.get(path, 0),
            }
        )
    return rows


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


class NormBench:
    """The norms of a run over ranks.

    Args:
        symm: our communicator.
        time: ``time(ways, nbytes, rounds)``: timings of calls by name, in turns; ``rounds`` None takes the run's.
        integers, total: ``of(n)``: this rank's integers, and their exact sum over the ranks.
        count: the number of wrong elements over all ranks, from a mask.
        reduces: torch's all-reduces by name: a buffer for ``n`` elements, and a function of it.
        meet: waits for all ranks on the host.
    """

    def __init__(
        self,
        symm: Any,
        dtype: torch.dtype,
        *,
        time: Callable[..., dict[str, Timing]],
        integers: Callable[[int], Tensor],
        total: Callable[[int], Tensor],
        count: Callable[[Tensor], int],
        reduces: Mapping[str, tuple[Callable[[int], Tensor], Callable[[Tensor], Tensor]]],
        meet: Callable[[], object],
    ):
        self._symm, self._dtype = symm, dtype
        self._time, self._integers, self._total, self._count = time, integers, total, count
        self._reduces, self._meet = reduces, meet
        self._hidden, self._norms = 0, {}

    def measure(self, common: Mapping[str, Any], tokens: int, hidden: int) -> list[dict[str, Any]]:
        """Every way to add over the ranks, add a residual and normalise; the rows."""
        dtype, n = self._dtype, tokens * hidden
        source = self._integers(n).view(tokens, hidden)
        residual, weight = torch.ones_like(source), torch.ones(hidden, dtype=dtype, device=source.device)
        expected = ops.add_rms_norm_reference(self._total(n).view(tokens, hidden), residual, weight, EPS)[0].float()
        ways = self._ours(source, residual, weight)
        ways |= self._peers(source, residual, weight)
        wrong = {}
        for way, (operand, function) in ways.items():
            operand.copy_(source)
            normed, _ = function()
            wrong[way] = 0
            if normed is not None:
                error = (normed.float() - expected).abs()
                wrong[way] = self._count(error > 2**-6 * (1 + expected.abs()))
        timed = self._time({way: function for way, (_, function) in ways.items()}, n * dtype.itemsize, None)
        return norm_rows(common, timed, wrong)

    def _ours(self, source: Tensor, residual: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Callable[[], Any]]]:
        symm, (tokens, hidden), size = self._symm, source.shape, source.element_size()
        shared = symm.get_buffer(source.shape, source.dtype)
        into = symm.get_buffer(source.shape, source.dtype, use="output")
        x = source.clone() if shared is None else shared
        chosen = same = "triton"
        if "one_shot" in symm.algorithms:
            chosen = algorithm_for(source.numel() * size, symm.world_size)
            same = norm_algorithm_for(tokens, hidden, size, symm.world_size)
        apart = torch.empty_like(source)

        def reduce(algorithm: str) -> Tensor:
            # Each where it needs no copy: the one-step ones cannot overwrite what peers still read.
            return symm.all_reduce(x, out=x if algorithm == "two_shot" else apart, algorithm=algorithm)

        ways: dict[str, tuple[Tensor, Callable[[], Any]]] = {
            "all_reduce": (x, lambda: (None, reduce(chosen))),
            "all_reduce_norm": (x, lambda: ops.add_rms_norm(reduce(chosen), residual, weight, EPS)),
            "fused": (x, lambda: symm.all_reduce_add_rms_norm(x, residual, weight, EPS, gather_sum=False, out=into)),
            "fused_gathered": (x, lambda: symm.all_reduce_add_rms_norm(x, residual, weight, EPS)),
        }
        if same != chosen:
            ways["all_reduce_same"] = (x, lambda: (None, reduce(same)))
        if tokens <= TRITON_TOKENS and "triton" in symm.algorithms:
            ways["fused_triton"] = (
                x,
                lambda: symm.all_reduce_add_rms_norm(x, residual, weight, EPS, out=into, algorithm="triton"),
            )
        return ways

    def _peers(self, source: Tensor, residual: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Callable[[], Any]]]:
        """The pairs that are worth it, and their all-reduces by themselves."""
        nbytes = source.numel() * source.element_size()
        if self._hidden != source.shape[1]:
            torch.compiler.reset()  # compiled for this width, and then for any number of tokens
            self._hidden, self._norms = source.shape[1], separate_norms()
        norms = {name: partial(norm, source.clone(), residual, weight) for name, norm in self._norms.items()}
        if not self._reduces:
            return {}
        for norm in norms.values():
            norm()  # ranks that still compile must not be waited for on the GPU
        self._meet()
        operands = {name: buffer(source.numel()).view(source.shape) for name, (buffer, _) in self._reduces.items()}
        reduces = {name: partial(self._reduces[name][1], operand) for name, operand in operands.items()}
        alone = self._time({**reduces, **norms}, nbytes, _FIRST_ROUNDS)
        pairs = choose_peers({name: alone[name] for name in reduces}, {name: alone[name] for name in norms})
        ways: dict[str, tuple[Tensor, Callable[[], Any]]] = {}
        for name, norm in pairs:
            reduce, normalise = reduces[name], self._norms[norm]
            ways[name] = (operands[name], lambda reduce=reduce: (None, reduce()))
            ways[f"{name}+{norm}"] = (
                operands[name],
                lambda reduce=reduce, normalise=normalise: normalise(reduce(), residual, weight),
            )
        return ways
