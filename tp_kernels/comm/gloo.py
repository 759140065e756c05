"""``GlooCommunicator``: collectives over TCP through torch.distributed, for ranks on several hosts and as the fallback.

Gloo only moves bytes here; the sums are ours: in fp32 for bf16 and fp16 (else in the dtype itself), in rank order,
rounded once. So every rank gets the same bits, and the same ones as over shared memory. Each call begins with a message
of fixed size in which the ranks compare what they called, and which carries the data of a small call along. Longer
all-reduces exchange slices, reduce them and gather the results, which moves as little as a ring.

Deadlines, dead ranks and what is said about them: ``gloo_watch.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from tp_kernels._native import DTYPE_CODES
from tp_kernels.comm.communicator import (
    DEFAULT_TIMEOUT,
    Communicator,
    Numerics,
    check_dim,
    check_reduce_op,
    check_root,
    gathered_sizes,
    resolve_sizes,
)
from tp_kernels.comm.errors import CommMismatchError
from tp_kernels.comm.gloo_watch import Call, Watch, limited

__all__ = ["GlooCommunicator"]

# Above this many bytes slices are exchanged instead of everything; below it one round trip less is worth more.
_SMALL = 64 * 1024

_OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")
_REDUCE_OPS = ("sum", "max")
_DTYPES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_HEADER = 6 * 8  # bytes: six int64


class GlooCommunicator(Communicator):
    """Collectives of one torch ProcessGroup's ranks.

    Args:
        process_group: a torch ProcessGroup with a CPU backend.
        name: the group's name, in errors.
        store: a torch Store with a prefix of this communicator's own, reachable by all ranks.
        timeout: default deadline in seconds.
        check: compare operation, size, dtype and root over the ranks in each call; costs long calls a small message.
    Raises:
        ValueError: if the group has no CPU backend.

    CUDA tensors are accepted and copied through host memory.
    """

    backend = "gloo"
    numerics = Numerics("float32", "rank", same_bits_on_all_ranks=True, size_dependent=False)

    def __init__(
        self,
        process_group: Any,
        *,
        name: str = "gloo",
        store: Any,
        timeout: float = DEFAULT_TIMEOUT,
        check: bool = True,
    ):
        try:
            process_group._get_backend(torch.device("cpu"))
        except RuntimeError as error:
            raise ValueError(
                f"GlooCommunicator: group {name} has no backend for CPU tensors; initialise torch.distributed with "
                "'gloo' or 'cpu:gloo,cuda:nccl'"
            ) from error
        self._pg = process_group
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.name, self.timeout, self._check = name, timeout, check
        # Bytes that travel with the comparison; all ranks get all of them, so fewer in larger groups. Multiple of 8.
        self._capacity = max(512, (64 * 1024 // self.world_size**2) & ~7) if self.world_size > 2 else 16 * 1024
        self._outgoing = torch.zeros(_HEADER + self._capacity, dtype=torch.uint8)
        self._incoming = torch.empty(self.world_size, _HEADER + self._capacity, dtype=torch.uint8)
        self._watch = Watch(name, self.rank, self.world_size, store, timeout)

    # Collectives -----------------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        check_reduce_op(op)
        _check_tensor(x, "all_reduce")
        if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
            raise ValueError(
                f"all_reduce: out must have shape {tuple(x.shape)} and dtype {x.dtype}, "
                f"got {tuple(out.shape)} and {out.dtype}"
            )
        flat = _host(x).reshape(-1)
        call, received = self._begin("all_reduce", flat, timeout, reduce_op=op, longest=_size(flat))
        if received is not None:
            total = _reduce(_parts(received, flat.dtype, [flat.numel()] * self.world_size), op)
        elif _size(flat) <= _SMALL:
            total = _reduce(self._gather_equal(call, flat), op)
        else:
            sizes = _even_sizes(flat.numel(), self.world_size)
            mine = self._reduce_slices(call, flat.split(sizes), op)
            total = torch.cat(self._gather_uneven(call, mine, sizes))
        result = total.view(x.shape)
        if out is None:
            return result.to(x.device)
        out.detach().copy_(result)
        return out

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        check_reduce_op(op)
        _check_tensor(x, "reduce_scatter")
        dim = check_dim(x, dim, "reduce_scatter")
        sizes = resolve_sizes(x.shape[dim], sizes, self.world_size, "reduce_scatter")
        parts = _host(x).split(sizes, dim)
        slices = [part.reshape(-1) for part in parts]
        flat = torch.cat(slices)
        call, received = self._begin(
            "reduce_scatter", flat, timeout, reduce_op=op, root=_digest(sizes), longest=_size(flat)
        )
        if received is not None:
            start, count = sum(part.numel() for part in slices[: self.rank]), slices[self.rank].numel()
            arrived = _parts(received, flat.dtype, [flat.numel()] * self.world_size)
            mine = _reduce([part[start : start + count] for part in arrived], op)
        else:
            mine = self._reduce_slices(call, slices, op)
        return mine.view(parts[self.rank].shape).to(x.device)

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        _check_tensor(x, "all_gather")
        dim = check_dim(x, dim, "all_gather")
        sizes = gathered_sizes(x.shape[dim], sizes, self.rank, self.world_size)
        row = x.numel() // x.shape[dim] if x.shape[dim] else _product(x.shape, dim)
        # What must agree is the whole result, not the ranks' own parts.
        flat, counts = _host(x).reshape(-1), [row * size for size in sizes]
        longest = max(counts) * flat.element_size()
        call, received = self._begin(
            "all_gather", flat, timeout, root=_digest(sizes), numel=sum(counts), longest=longest
        )
        if received is not None:
            parts = _parts(received, flat.dtype, counts)
        else:
            parts = self._gather_uneven(call, flat, counts)
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        result = torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)
        return result.to(x.device)

    def broadcast(self, x, src=0, *, timeout=None):
        check_root(src, self.world_size)
        _check_tensor(x, "broadcast")
        flat = _host(x).reshape(-1)
        call, received = self._begin("broadcast", flat, timeout, root=src, longest=_size(flat))
        if received is not None:
            flat = _parts(received, flat.dtype, [flat.numel()] * self.world_size)[src]
        elif flat.numel():
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = src, 0
            self._watch.run(call, lambda: self._pg.broadcast([_bytes(flat)], limited(options, call)))
        if self.rank != src:
            x.detach().copy_(flat.view(x.shape))
        return x

    def barrier(self, *, timeout=None):
        self._begin("barrier", torch.empty(0), timeout, check=True)  # the comparison is the barrier

    def close(self) -> None:
        self._watch.broken = self._watch.broken or "it was closed"
        self._pg = None

    # Moving bytes ----------------------------------------------------------------------------------------------------

    def _gather_equal(self, call: Call, flat: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor, all of the same length; empty ones move nothing."""
        if flat.numel() == 0:
            return [flat] * self.world_size
        gathered = flat.new_empty((self.world_size, flat.numel()))
        target, source = _bytes(gathered.view(-1)), _bytes(flat)
        self._watch.run(call, lambda: self._pg._allgather_base(target, source, limited(AllgatherOptions(), call)))
        return list(gathered.unbind(0))

    def _gather_uneven(self, call: Call, flat: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        if len(set(counts)) == 1:
            return self._gather_equal(call, flat)
        longest = max(counts)
        padded = flat.new_empty(longest)
        padded[: flat.numel()] = flat
        return [part[:count] for part, count in zip(self._gather_equal(call, padded), counts, strict=True)]

    def _reduce_slices(self, call: Call, parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
        """``parts[r]`` goes to rank r; returns the reduction of those that came here."""
        size = parts[0].element_size()
        sent = [part.numel() * size for part in parts]
        received = [sent[self.rank]] * self.world_size
        source = torch.cat([_bytes(part.contiguous()) for part in parts])
        target = torch.empty(sum(received), dtype=torch.uint8)
        if any(sent):
            options = dist.AllToAllOptions()
            self._watch.run(
                call, lambda: self._pg.alltoall_base(target, source, received, sent, limited(options, call))
            )
        if not sent[self.rank]:
            return parts[self.rank].clone()
        return _reduce(target.view(parts[0].dtype).chunk(self.world_size), op)

    # What every call begins with ------------------------------------------------------------------------------------

    def _begin(
        self, operation, flat, timeout, *, reduce_op="sum", root=0, numel=None, longest=0, check=None
    ) -> tuple[Call, torch.Tensor | None]:
        """Start a call; compare it over the ranks, and exchange ``flat`` with it if ``longest`` bytes fit.

        Returns the call, and what each rank sent along (a row of bytes each, see ``_parts``) or None.
        """
        call = self._watch.begin(operation, self.timeout if timeout is None else timeout)
        if not (self._check if check is None else check):
            return call, None
        header = [
            _OPERATIONS.index(operation),
            call.sequence,
            flat.numel() if numel is None else numel,
            _DTYPES[flat.dtype],
            _REDUCE_OPS.index(reduce_op),
            root,
        ]
        self._outgoing[:_HEADER].view(torch.int64).copy_(torch.tensor(header))
        carries = longest <= self._capacity
        if carries and flat.numel():
            self._outgoing[_HEADER : _HEADER + _size(flat)] = _bytes(flat)
        target = self._incoming.view(-1)
        self._watch.run(
            call, lambda: self._pg._allgather_base(target, self._outgoing, limited(AllgatherOptions(), call))
        )
        headers = self._incoming[:, :_HEADER]
        if not torch.equal(headers, headers[:1].expand_as(headers)):
            self._fail_mismatch(call, list(headers.contiguous().view(torch.int64)))
        return call, self._incoming if carries else None

    def _fail_mismatch(self, call: Call, headers: list[torch.Tensor]) -> NoReturn:
        lines = [f"rank {rank}: {_describe_header(header)}" for rank, header in enumerate(headers)]
        counts = [sum(torch.equal(a, b) for b in headers) for a in headers]
        odd = [rank for rank, count in enumerate(counts) if count < max(counts)] or list(range(self.world_size))
        message = f"group {self.name}: ranks called different collectives: " + "; ".join(lines)
        self._watch.broken = message
        raise CommMismatchError(message, group=self.name, operation=call.operation, sequence=call.sequence, ranks=odd)


def _reduce(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """Reduce in list order; 16-bit sums in fp32, rounded once. Returns a tensor of its own."""
    first = parts[0]
    if op == "max":
        result = first.clone()
        for part in parts[1:]:
            torch.maximum(result, part, out=result)
        return result
    wide = first.dtype in (torch.bfloat16, torch.float16)
    result = first.float() if wide else first.clone()
    for part in parts[1:]:
        result += part
    return result.to(first.dtype)


def _parts(received: torch.Tensor, dtype: torch.dtype, counts: Sequence[int]) -> list[torch.Tensor]:
    """The ranks' ``counts[r]`` elements that came with the comparison; valid until the next call."""
    size = dtype.itemsize
    return [row[_HEADER : _HEADER + n * size].view(dtype) for row, n in zip(received, counts, strict=True)]


def _host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().contiguous()


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: gloo then need not know the dtype."""
    return flat.view(torch.uint8)


def _size(flat: torch.Tensor) -> int:
    return flat.numel() * flat.element_size()


def _digest(sizes: Sequence[int]) -> int:
    """Tells one split from another in the comparison; takes the root's place there."""
    return zlib.crc32(repr(list(sizes)).encode())


def _even_sizes(total: int, parts: int) -> list[int]:
    base, extra = divmod(total, parts)
    return [base + (index < extra) for index in range(parts)]


def _product(shape: Sequence[int], without: int) -> int:
    count = 1
    for dim, extent in enumerate(shape):
        count *= 1 if dim == without else extent
    return count


def _check_tensor(x: torch.Tensor, operation: str) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{operation}: unsupported dtype {x.dtype}; expected one of {', '.join(DTYPE_CODES)}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{operation}: expected a CPU or CUDA tensor, got one on {x.device}")


def _describe_header(header: torch.Tensor) -> str:
    operation, sequence, numel, dtype, reduce_op, root = header.tolist()
    name = _OPERATIONS[operation]
    text = f"call {sequence} is {name}"
    if name == "barrier":
        return text
    text += f" of {numel} {_DTYPE_NAMES[dtype]}"
    if name in ("all_reduce", "reduce_scatter"):
        text += f" {_REDUCE_OPS[reduce_op]}"
    if name == "broadcast":
        text += f" from {root}"
    if name in ("reduce_scatter", "all_gather"):
        text += f" split by sizes #{root:08x}"
    return text
