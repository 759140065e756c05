"""``SymmetricMemoryCommunicator``: collectives between GPUs that can map each other's memory, or ranks on one GPU.

Memory comes from torch's SymmetricMemory (see ``symmetric_workspace``), all-reduce kernels are our own
(csrc/kernels/peer_*). ``algorithm_for`` chooses among them by size alone:

    lamport    every rank pushes its data to all others; the data is its own flag, so there is no barrier
    one_shot   every rank reads all data of all ranks
    two_shot   every rank reduces one slice and distributes it
    multimem   two_shot, and multimem_one_shot, added by the NVLink switch; only on request: its sums have other bits
    triton     one_shot in Triton, for a native core that was built without CUDA; elsewhere on request

Numerics: fp32 sums in rank order, rounded once; the same bits on all ranks and for all algorithms but multimem, so also
for every size. Other dtypes and maxima are gathered and reduced by PyTorch in rank order.

CUDA graphs: every call may be captured; nothing is allocated symmetrically and the host never waits, ``barrier`` apart.
All ranks make the same calls, replays included, in the same order; calls of one communicator are ordered by one stream
or by events. A call that one rank captures and others make is one in which that rank does not come until the replay.

Failure: each wait inside a kernel has a deadline. A kernel that gives up says so in host memory, which the next call
and ``check()`` read: ``CommTimeoutError`` then names the rank waited for (``PeerDiedError`` if its process has ended).
Until someone looks, the results are garbage. Ranks that call different things wait for each other, or, where the
difference does not show in the grids (a dtype, a few elements), add what is not theirs: ``check=True`` finds it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tp_kernels import one_gpu
from tp_kernels._native import has_cuda, native
from tp_kernels.comm.communicator import (
    DEFAULT_TIMEOUT,
    Numerics,
    check_dim,
    check_reduce_op,
    check_root,
    check_timeout,
    gathered_sizes,
    resolve_sizes,
)
from tp_kernels.comm.nccl_peers import Peers
from tp_kernels.comm.symmetric_calls import KERNEL_DTYPES, KernelCalls
from tp_kernels.comm.symmetric_linear import FusedLinear
from tp_kernels.comm.symmetric_sizes import (
    ALGORITHMS,
    CUDA_ALGORITHMS,
    LAMPORT_BYTES,
    MAX_ROW_PACKS,
    PACK_BYTES,
    algorithm_for,
    lamport_rows,
    norm_algorithm_for,
    rows_per_call,
)
from tp_kernels.comm.symmetric_workspace import (
    SymmetricMemoryUnavailable,
    Workspace,
    common_algorithms,
    has_triton,
    unavailable_reason,
)

__all__ = ["MAX_BYTES", "SymmetricMemoryCommunicator", "SymmetricMemoryUnavailable"]

# 64 MiB: 4096 tokens of 8192 16-bit elements.
MAX_BYTES = 64 << 20


class SymmetricMemoryCommunicator(FusedLinear):
    """Collectives of 2 to 16 ranks over CUDA tensors; made by ``create``. See the module's documentation.

    All-reduce by our kernels for float32, bfloat16 and float16; everything else takes every dtype. Tensors need not be
    contiguous. ``close()`` is not a collective. ``linear_all_reduce`` is in ``symmetric_linear``.

    Attributes:
        counters: path -> calls, as made by the host (a captured call counts once).
        fused_norm: offers ``all_reduce_add_rms_norm``.
        max_blocks: the largest grid, agreed by all ranks.
        algorithms: that all ranks have, multimem apart.
        overlap_modes: "fused" (``linear_all_reduce``) where "triton" is among them.
        has_multicast: whether "multimem" can be asked for.
    """

    backend = "symm"
    numerics = Numerics("float32", "rank", same_bits_on_all_ranks=True, size_dependent=False)
    fused_norm = True

    def __init__(
        self,
        workspace: Workspace,
        rank: int,
        world_size: int,
        name: str,
        timeout: float,
        max_blocks: int,
        algorithms: tuple[str, ...] = CUDA_ALGORITHMS,
        peers: Peers | None = None,
        check: bool = False,
    ):
        self.rank, self.world_size, self.name, self.timeout = rank, world_size, name, timeout
        self.max_blocks, self.algorithms = max_blocks, algorithms
        self._has_cuda = "one_shot" in algorithms
        self.overlap_modes = ("fused",) if "triton" in algorithms else ()
        self.has_multicast = self._has_cuda and workspace.multicast != 0
        self.counters: Counter[str] = Counter()
        self._layout = workspace.layout
        self._calls = KernelCalls(workspace, rank, world_size, name, timeout, max_blocks, algorithms, peers, check)

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        name: str,
        store: Any,
        process_group: Any,
        device: torch.device,
        *,
        max_bytes: int = MAX_BYTES,
        timeout: float = DEFAULT_TIMEOUT,
        max_blocks: int | None = None,
        check: bool | None = None,
    ) -> SymmetricMemoryCommunicator:
        """Make the group's memory together with its other ranks.

        Args:
            rank, world_size: of this process in the group.
            name: for messages.
            store: a torch Store with a prefix of this communicator's own; used later for check mode only.
            process_group: torch's group of the same ranks, of any backend; SymmetricMemory exchanges handles over it.
            device: of the group's tensors. Ranks may share one; see ``launch --one-gpu``.
            max_bytes: longest message that is not divided; this rank's memory is a little over four times that.
            timeout: seconds to wait for the other ranks, here and by default in every wait of a kernel.
            max_blocks: largest grid; None takes this rank's multiprocessors. The smallest of all ranks counts.
            check: compare operation, dtype, shape and options over the ranks before each call, through the store: slow,
                for finding mistakes. None is TP_KERNELS_COMM_CHECK=1.
        Raises:
            SymmetricMemoryUnavailable: on all ranks alike, if any rank could not (no peer access, out of memory).
            CommTimeoutError: a rank did not come; ValueError: for bad arguments.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        check_timeout(timeout)
        device = torch.device(device)
        reason = unavailable_reason(device)
        if not reason:
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            if max_blocks is None:
                max_blocks = one_gpu.own_max_blocks(device)
        if check is None:
            check = os.environ.get("TP_KERNELS_COMM_CHECK") == "1"
        mine = {"error": reason, "max_blocks": max_blocks or 0, "max_bytes": max_bytes, "check": bool(check)}
        mine |= {"cuda": has_cuda(), "triton": has_triton()}
        peers = Peers(store, rank, world_size, name, mine, timeout)
        everyone = peers.facts
        for other, facts in enumerate(everyone):
            if facts["error"]:
                raise SymmetricMemoryUnavailable(f"rank {other}: {facts['error']}")
        algorithms = common_algorithms(everyone)
        if len({facts["max_bytes"] for facts in everyone}) > 1:
            raise ValueError(
                f"all ranks must pass the same max_bytes, got {[facts['max_bytes'] for facts in everyone]}"
            )
        max_blocks = min(facts["max_blocks"] for facts in everyone)
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be positive, got {[facts['max_blocks'] for facts in everyone]}")
        with torch.cuda.device(device):
            workspace = Workspace.create(rank, world_size, name, store, process_group, device, max_bytes, timeout)
            check = any(facts["check"] for facts in everyone)  # those without would be waited for
            return cls(workspace, rank, world_size, name, timeout, max_blocks, algorithms, peers, check)

    @property
    def sequence(self) -> int:
        """Collectives begun so far."""
        return self._calls.sequence

    # Buffers ---------------------------------------------------------------------------------------------------------

    def get_buffer(self, shape: Sequence[int], dtype: torch.dtype, use: str = "input") -> torch.Tensor | None:
        """Memory that all ranks can reach, so that a collective needs no copy in or out.

        There is one such buffer for each use, and every call returns its beginning: it is yours until the next
        ``get_buffer`` of the same use, which gives it to somebody else; collectives themselves never touch it unless it
        is their operand. Work on one stream is enough to keep owners apart: a collective ends only when no rank reads
        its operand any more, and writes results to peers only when they have come to the same call.

        Args:
            shape, dtype: the same on all ranks for the operand of one collective.
            use: "input" for operands, "output" for results.
        Returns:
            An uninitialised tensor, or None if it would not fit (``max_bytes``).
        """
        if use not in ("input", "output"):
            raise ValueError(f"get_buffer: use must be 'input' or 'output', got {use!r}")
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        if count > self._layout.half_bytes:
            return None
        offset = self._layout.inputs if use == "input" else self._layout.outputs
        return self._calls.open().tensor(offset, tuple(shape), dtype)

    # All-reduce ------------------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum", *, out=None, timeout=None, algorithm=None):
        """As ``Communicator.all_reduce``.

        Args:
            algorithm: one of ``algorithms``, or a multimem one where ``has_multicast``; None takes ``algorithm_for``,
                or "triton" where nothing else is.
        """
        self._calls.begin("all_reduce", x, timeout, op=op, algorithm=algorithm)
        check_reduce_op(op)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif out is not x and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
            raise ValueError(
                f"all_reduce: out must be {tuple(x.shape)} {x.dtype} on {x.device}, got {tuple(out.shape)} "
                f"{out.dtype} on {out.device}"
            )
        if op != "sum" or x.dtype not in KERNEL_DTYPES:
            out.detach().copy_(self._gathered_reduction(x, op, timeout))
            return out
        source = x.contiguous()
        if out is x:
            target = source
        else:
            target = out if out.is_contiguous() else torch.empty_like(source)
        self._sum(source, target, algorithm, timeout)
        if target is not out:
            out.detach().copy_(target)
        return out

    def _sum(self, source: torch.Tensor, target: torch.Tensor, algorithm: str | None, timeout: float | None) -> None:
        count, size = source.numel(), source.element_size()
        if algorithm is None:
            algorithm = algorithm_for(count * size, self.world_size) if self._has_cuda else "triton"
        elif algorithm not in (known := self._algorithms(*ALGORITHMS)):
            raise ValueError(f"all_reduce: algorithm must be one of {', '.join(known)}, got {algorithm!r}")
        self.counters[algorithm] += 1
        step = (LAMPORT_BYTES if algorithm == "lamport" else self._layout.half_bytes) // size
        if algorithm == "triton":
            for piece, result in zip(source.view(-1).split(step), target.view(-1).split(step), strict=True):
                self._calls.triton_sum(piece, result, timeout)
            return
        at, to = source.data_ptr(), target.data_ptr()
        for start in range(0, count, step):
            done, piece = start * size, min(step, count - start)
            self._calls.all_reduce(algorithm, at + done, to + done, piece, source.dtype, timeout)

    def _algorithms(self, *of_cuda: str) -> list[str]:
        """What may be asked for, with the native kernels' share of it given."""
        return [*(of_cuda if self._has_cuda else ()), *(name for name in self.algorithms if name == "triton")]

    # All-reduce + norm -----------------------------------------------------------------------------------------------

    def fuses_norm(self, width: int, dtype: torch.dtype) -> bool:
        """Whether ``all_reduce_add_rms_norm`` takes rows of ``width`` elements of ``dtype``, however many."""
        return dtype in KERNEL_DTYPES and rows_per_call(width, dtype.itemsize, self._layout.half_bytes) > 0

    def all_reduce_add_rms_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        bias: torch.Tensor | None = None,
        round_before_norm: bool = True,
        gather_sum: bool = True,
        out: torch.Tensor | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``s = all_reduce(partial) + bias + residual``; returns ``(rms_norm(s) * weight, s)`` from one kernel.

        Args:
            partial, residual: [..., H], contiguous, of one dtype; ``partial`` may be one of ``get_buffer``.
            weight, bias: [H] in that dtype, contiguous.
            eps: added to the mean square.
            round_before_norm: round where separate ops would; False keeps fp32 from the sum to each result.
            gather_sum: False leaves the sum valid only in the rows that this rank reduces, which is all that the next
                call of the same shape and algorithm reads of its residual. Two-shot then moves less.
            out: for the normed rows: a tensor of ``get_buffer(..., use="output")`` saves a copy; None allocates.
            algorithm: one of ``algorithms``; None takes ``norm_algorithm_for``, or "triton" where nothing else is.
            timeout: deadline of a wait in seconds.
        Raises:
            ValueError: operands that do not fit together; see ``fuses_norm``.
        """
        facts = {"bias": bias is not None, "eps": eps, "round": round_before_norm, "gather": gather_sum}
        self._calls.begin("all_reduce_add_rms_norm", partial, timeout, algorithm=algorithm, **facts)
        width, dtype, size = partial.shape[-1], partial.dtype, partial.element_size()
        step = rows_per_call(width, size, self._layout.half_bytes)
        if step < 1 or dtype not in KERNEL_DTYPES:
            widest = min(MAX_ROW_PACKS * PACK_BYTES, self._layout.half_bytes // 2) // size
            raise ValueError(
                f"all_reduce_add_rms_norm: no kernel for rows of {width} elements of {dtype}; expected 1 to {widest} "
                "of float32, bfloat16 or float16"
            )
        _check_norm_operands(partial, residual, weight, bias, out)
        rows = partial.numel() // width
        normed = torch.empty_like(partial) if out is None else out
        summed = torch.empty_like(partial)
        if algorithm is None:
            algorithm = norm_algorithm_for(rows, width, size, self.world_size) if self._has_cuda else "triton"
        elif algorithm not in self.algorithms:
            names = ", ".join(self.algorithms)
            raise ValueError(f"all_reduce_add_rms_norm: algorithm must be one of {names}, got {algorithm!r}")
        if algorithm == "lamport":
            step = max(1, min(step, lamport_rows(width, size)))
        self.counters[f"norm_{algorithm}"] += 1
        if algorithm == "triton":
            for start in range(0, rows, step):
                x, old, new, total = (
                    t.view(rows, width)[start : start + step] for t in (partial, residual, normed, summed)
                )
                self._calls.triton_norm((x, bias, old, weight, new, total), eps, round_before_norm, timeout)
            return normed, summed
        x_at, residual_at, weight_at = partial.data_ptr(), residual.data_ptr(), weight.data_ptr()
        normed_at, summed_at = normed.data_ptr(), summed.data_ptr()
        bias_at = 0 if bias is None else bias.data_ptr()
        for start in range(0, rows, step):
            done = start * width * size
            tensors = (x_at + done, bias_at, residual_at + done, weight_at, normed_at + done, summed_at + done)
            self._calls.all_reduce_norm(
                algorithm,
                tensors,
                eps,
                min(step, rows - start),
                width,
                dtype,
                round_before_norm,
                gather_sum,
                timeout,
            )
        return normed, summed

    # Other collectives -----------------------------------------------------------------------------------------------

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        workspace = self._calls.begin("reduce_scatter", x, timeout, op=op, dim=dim, sizes=_listed(sizes))
        check_reduce_op(op)
        dim = check_dim(x, dim, "reduce_scatter")
        sizes = resolve_sizes(x.shape[dim], sizes, self.world_size, "reduce_scatter")
        if op != "sum" or x.dtype not in KERNEL_DTYPES:
            return self._gathered_reduction(x, op, timeout).split(sizes, dim)[self.rank].contiguous()
        if not self._has_cuda:  # the sum of everything, by the one kernel there is
            source = x.detach().contiguous()
            total = torch.empty_like(source)
            self._sum(source, total, None, timeout)
            return total.split(sizes, dim)[self.rank].contiguous()
        self.counters["reduce_scatter"] += 1
        # A slice one element wide would be a view with gaps even after reshape(-1), and bytes have none.
        parts = [part.contiguous().view(-1) for part in x.detach().split(sizes, dim)]
        out = x.new_empty((*x.shape[:dim], sizes[self.rank], *x.shape[dim + 1 :]))
        # The mailbox holds one slot for each receiver; long slices come in pieces of a slot.
        slot = self._layout.mailbox_bytes // self.world_size // PACK_BYTES * PACK_BYTES
        size, mailbox = x.element_size(), workspace.mailboxes[self.rank]
        step = slot // size
        own = self._layout.mailbox + self.rank * slot
        for start in range(0, max(part.numel() for part in parts), step):
            for receiver, part in enumerate(parts):
                _copy(mailbox[receiver * slot :], _bytes(part)[start * size : (start + step) * size])
            self._calls.meet(timeout)
            count = min(step, out.numel() - start)
            if count > 0:
                sources = [data + own for data in workspace.data]
                to = out.data_ptr() + start * size
                self._calls.launch(native.cuda_reduce_buffers, sources, to, count, KERNEL_DTYPES[x.dtype])
            self._calls.meet(timeout)
        return out

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        # Along ``dim`` the parts may differ; what they are together is in ``sizes``.
        shape = [extent for i, extent in enumerate(x.shape) if sizes is None or i != dim % max(1, x.dim())]
        self._calls.begin("all_gather", x, timeout, shape=shape, dim=dim, sizes=_listed(sizes))
        dim = check_dim(x, dim, "all_gather")
        sizes = gathered_sizes(x.shape[dim], sizes, self.rank, self.world_size)
        self.counters["all_gather"] += 1
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat(self._gather(x, shapes, timeout), dim)

    def broadcast(self, x, src=0, *, timeout=None):
        workspace = self._calls.begin("broadcast", x, timeout, src=src)
        check_root(src, self.world_size)
        self.counters["broadcast"] += 1
        target = x.detach().contiguous()
        flat, mailbox = _bytes(target.view(-1)), workspace.mailboxes[src]
        for start in range(0, flat.numel(), mailbox.numel()):
            piece = flat[start : start + mailbox.numel()]
            if self.rank == src:
                _copy(mailbox, piece)
            self._calls.meet(timeout)
            if self.rank != src:
                piece.copy_(mailbox[: piece.numel()])
            self._calls.meet(timeout)
        if not x.is_contiguous():
            x.detach().copy_(target)
        return x

    def barrier(self, *, timeout=None):
        """As ``Communicator.barrier``: the host waits, unless the stream is being captured."""
        self._calls.begin("barrier", None, timeout)
        self.counters["barrier"] += 1
        self._calls.meet(timeout)
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._calls.device).synchronize()
            self.check()

    def _gather(self, x: torch.Tensor, shapes: Sequence[tuple[int, ...]], timeout: float | None) -> list[torch.Tensor]:
        """Every rank's tensor, of the given shapes, through the mailboxes."""
        mailboxes, step = self._calls.open().mailboxes, self._layout.mailbox_bytes
        parts = [x.new_empty(shape) for shape in shapes]
        parts[self.rank] = x.detach().contiguous()
        flat = [_bytes(part.view(-1)) for part in parts]
        for start in range(0, max(part.numel() for part in flat), step):
            _copy(mailboxes[self.rank], flat[self.rank][start : start + step])
            self._calls.meet(timeout)
            for turn in range(1, self.world_size):
                rank = (self.rank + turn) % self.world_size
                piece = flat[rank][start : start + step]
                if piece.numel():
                    piece.copy_(mailboxes[rank][: piece.numel()])
            self._calls.meet(timeout)
        return parts

    def _gathered_reduction(self, x: torch.Tensor, op: str, timeout: float | None) -> torch.Tensor:
        """What the kernels do not offer: all data to all ranks, reduced by PyTorch in rank order."""
        self.counters["gathered_reduction"] += 1
        parts = self._gather(x, [tuple(x.shape)] * self.world_size, timeout)
        total = parts[0].clone()
        for part in parts[1:]:
            total = torch.maximum(total, part) if op == "max" else total + part
        return total

    # Errors ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if a kernel has given up since the last look. Kernels still running may do so later.

        Raises:
            CommTimeoutError: names the rank waited for; the communicator is unusable from then on.
        """
        self._calls.check()

    def close(self) -> None:
        """Give the memory back. Kernels of this rank that still wait for others are ended after a few seconds.

        CUDA graphs that hold calls of this communicator, and tensors of ``get_buffer``, must not be used afterwards.
        """
        self._calls.close()

    def __repr__(self) -> str:
        return f"SymmetricMemoryCommunicator(name={self.name!r}, rank={self.rank}, world_size={self.world_size})"


def _listed(sizes: Sequence[int] | None) -> list[int] | None:
    return None if sizes is None else list(sizes)


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """``source`` into the beginning of ``target``; both flat."""
    if source.numel():
        target[: source.numel()].copy_(source)


def _check_norm_operands(partial, residual, weight, bias, out) -> None:
    width = partial.shape[-1]
    for name, tensor, shape in (
        ("partial", partial, partial.shape),
        ("residual", residual, partial.shape),
        ("out", out, partial.shape),
        ("weight", weight, (width,)),
        ("bias", bias, (width,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != partial.dtype or tensor.device != partial.device:
            raise ValueError(
                f"all_reduce_add_rms_norm: expected {name} {list(shape)} {partial.dtype} on {partial.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"all_reduce_add_rms_norm: {name} must be contiguous")
