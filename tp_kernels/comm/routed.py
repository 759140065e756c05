"""``RoutedCommunicator``: one group's transports behind one communicator, a path for every call, and an account of it.

Every call is carried by the path that ``paths.route`` names for its operation and bytes, among those that can take it
and whose sums have the group's numerics. All of that is equal on all ranks: what the call is, which transports were
made together, and the table that the first rank handed out. A call that only Gloo can take, on a group that has better,
is a fallback: warned of once, or an error under ``strict=True``.

``counters`` tells what really ran (as called by the host: a captured call counts once, its replays do not),
``describe`` puts it in words together with the paths by size and why others are not taken.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tp_kernels._native import DTYPE_CODES
from tp_kernels.comm import paths
from tp_kernels.comm.communicator import Communicator, Handle, Numerics
from tp_kernels.comm.paths import LAMPORT, MULTIMEM, MULTIMEM_ONE_SHOT, ONE_SHOT, SYMM, TRITON, TWO_SHOT, PathTable
from tp_kernels.comm.policy import BackendUnavailableError
from tp_kernels.comm.symmetric_sizes import LAMPORT_BYTES, MAX_LAMPORT_ROW_PACKS, PACK_BYTES, row_packs

__all__ = ["LINEAR", "RoutedCommunicator", "paths_of"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HOST_DTYPES = frozenset(getattr(torch, name) for name in DTYPE_CODES)
_TORCH_DTYPES = _HOST_DTYPES | {torch.int8, torch.uint8, torch.int16}
_NCCL_DTYPES = _HOST_DTYPES | {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
# Among ``counters`` only: what a call of it takes is no choice among paths.
LINEAR = "symm:linear"
_KERNELS = (ONE_SHOT, TWO_SHOT, LAMPORT, TRITON)
_MULTICAST = (MULTIMEM, MULTIMEM_ONE_SHOT)


def paths_of(members: Mapping[str, Communicator]) -> list[str]:
    """The paths that these transports have on this rank."""
    found: list[str] = []
    for name, member in members.items():
        if name == "symm":
            kernels = (f"symm:{algorithm}" for algorithm in member.algorithms)
            found += [*kernels, SYMM, *(_MULTICAST if member.has_multicast else ())]
        else:
            found.append(name)
    return found


@dataclass(frozen=True)
class _Call:
    """What decides on the path; equal on all ranks."""

    operation: str
    nbytes: int
    dtype: torch.dtype | None
    device_type: str
    reduce_op: str = "sum"
    packs: int = 0  # of a row, for all_reduce_norm

    @property
    def exact(self) -> bool:
        return paths.is_exact(self.operation, self.dtype is not None and self.dtype.is_floating_point)

    def __str__(self) -> str:
        if self.dtype is None:
            return self.operation
        kind = f" ({self.reduce_op})" if self.operation in ("all_reduce", "reduce_scatter") else ""
        size = paths.describe_bytes(self.nbytes)
        return f"{self.operation}{kind} of {size} {_name_of(self.dtype)} on {self.device_type}"


class RoutedCommunicator(Communicator):
    """Collectives of one group over its transports. See the module's documentation.

    Args:
        members: "symm", "nccl" and "gloo" to communicators of the same ranks, in order of preference.
        numerics: which classes floating-point sums may come from, one of ``paths.NUMERICS``.
        table: thresholds; the same on all ranks.
        available: paths that all ranks have; None for those of this rank's ``members``.
        device_type: where the tensors live that ``symm`` and ``nccl`` take.
        strict: a fallback raises.

    Attributes:
        counters: path -> calls, as made by the host; ``LINEAR`` -> those of ``linear_all_reduce``.
        fused_norm: offers ``all_reduce_add_rms_norm``.
        max_ctas: NCCL's budget of SMs, on a group whose sums it overlaps; else None.
    """

    def __init__(
        self,
        members: Mapping[str, Communicator],
        *,
        numerics: str,
        table: PathTable,
        available: Iterable[str] | None = None,
        device_type: str = "cuda",
        strict: bool = False,
    ):
        self._members = dict(members)
        self.backend, first = next(iter(self._members.items()))
        self.rank, self.world_size, self.name, self.timeout = first.rank, first.world_size, first.name, first.timeout
        self.numerics_class, self.table, self.strict, self._device_type = numerics, table, strict, device_type
        self._paths = tuple(paths_of(self._members) if available is None else dict.fromkeys(available))
        # Looked up in every call: whose path it is, and what the member must be told.
        self._ways = {path: self._way(path) for path in self._paths}
        self.counters: Counter[str] = Counter()
        self._routes: dict[tuple, str] = {}
        self._fallbacks: dict[str, str] = {}
        symm = self._members.get("symm")
        self.fused_norm = bool(getattr(symm, "fused_norm", False))
        sums = paths.allowed_paths(self._paths, numerics)
        carriers = [member for name, member in self._members.items() if any(_member_of(p) == name for p in sums)]
        self.numerics = _combined(carriers or [first], several=numerics == "any" and len(carriers) > 1)
        # With numerics="any" a part of a message may take another path than the whole, so its bits might change.
        modes = () if numerics == "any" or not carriers else carriers[0].overlap_modes
        # That cuts nothing: it is there wherever peer memory may carry sums.
        fused = symm in carriers and "fused" in symm.overlap_modes
        self.overlap_modes = tuple(dict.fromkeys((*modes, *(("fused",) if fused else ()))))
        # What overlap was measured with.
        self.max_ctas = getattr(carriers[0], "max_ctas", None) if modes else None

    # Collectives -----------------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        path = self._take("all_reduce", x.nbytes, x.dtype, x.device.type, op)
        return self._all_reduce(path, x, op, out, timeout)

    def all_reduce_by(self, path: str, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """``all_reduce`` of a sum by a path of the caller's choice: for measurements."""
        if path not in self._paths:
            raise ValueError(f"group {self.name} has no path {path!r}; it has {', '.join(self._paths)}")
        self.counters[path] += 1
        return self._all_reduce(path, x, "sum", out, None)

    def all_reduce_async(self, x, op="sum", *, out=None):
        path = self._take("all_reduce", x.nbytes, x.dtype, x.device.type, op)
        member, options = self._ways[path]
        if options:
            return Handle(member.all_reduce(x, op, out=out, **options))
        return member.all_reduce_async(x, op, out=out)

    def bind_all_reduce(self, x) -> Callable[[], object]:
        call = _Call("all_reduce", x.nbytes, x.dtype, x.device.type)
        path = self._decide(call)
        member, options = self._ways[path]
        run = partial(member.all_reduce, x, out=x, **options) if options else member.bind_all_reduce(x)

        def bound() -> object:
            self._take("all_reduce", call.nbytes, call.dtype, call.device_type)
            return run()

        return bound

    def _all_reduce(self, path: str, x: torch.Tensor, op: str, out: Any, timeout: Any) -> torch.Tensor:
        member, options = self._ways[path]
        return member.all_reduce(x, op, out=out, timeout=timeout, **options)

    def _way(self, path: str) -> tuple[Communicator, dict[str, str]]:
        name, _, algorithm = path.partition(":")
        return self._members[name], {"algorithm": algorithm} if algorithm else {}

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        member = self._carrier("reduce_scatter", x.nbytes, x, op)
        return member.reduce_scatter(x, op, dim=dim, sizes=sizes, timeout=timeout)

    def reduce_scatter_async(self, x, op="sum", *, dim=0, sizes=None):
        return self._carrier("reduce_scatter", x.nbytes, x, op).reduce_scatter_async(x, op, dim=dim, sizes=sizes)

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        member = self._carrier("all_gather", _gathered_bytes(x, dim, sizes, self.world_size), x)
        return member.all_gather(x, dim=dim, sizes=sizes, timeout=timeout)

    def all_gather_async(self, x, *, dim=0, sizes=None):
        member = self._carrier("all_gather", _gathered_bytes(x, dim, sizes, self.world_size), x)
        return member.all_gather_async(x, dim=dim, sizes=sizes)

    def broadcast(self, x, src=0, *, timeout=None):
        return self._carrier("broadcast", x.nbytes, x).broadcast(x, src, timeout=timeout)

    def barrier(self, *, timeout=None):
        path = self._take("barrier", 0, None, self._device_type)
        self._ways[path][0].barrier(timeout=timeout)

    # What peer memory offers besides ---------------------------------------------------------------------------------

    def get_buffer(self, shape: Sequence[int], dtype: torch.dtype, use: str = "input") -> torch.Tensor | None:
        """As ``SymmetricMemoryCommunicator.get_buffer``, else as ``NCCLCommunicator.get_buffer``, else None."""
        owner = self._members.get("symm") or self._members.get("nccl")
        return None if owner is None else owner.get_buffer(shape, dtype, use)

    def fuses_norm(self, width: int, dtype: torch.dtype) -> bool:
        """Whether ``all_reduce_add_rms_norm`` takes rows of ``width`` elements of ``dtype``."""
        return self.fused_norm and self._members["symm"].fuses_norm(width, dtype)

    def all_reduce_add_rms_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        algorithm: str | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``SymmetricMemoryCommunicator.all_reduce_add_rms_norm``; without ``algorithm`` the table chooses.

        Raises:
            BackendUnavailableError: a group without peer memory; see ``fused_norm``.
        """
        if not self.fused_norm:
            raise BackendUnavailableError(
                f"group {self.name}: all-reduce fused with the norm needs peer memory, and the group has "
                f"{', '.join(self._members)}",
                group=self.name,
            )
        if algorithm is None:
            width, size = partial.shape[-1], partial.element_size()
            packs = row_packs(width, size)
            nbytes = partial.numel() // max(1, width) * packs * PACK_BYTES
            path = self._take("all_reduce_norm", nbytes, partial.dtype, partial.device.type, packs=packs)
            algorithm = path.partition(":")[2]
        else:
            self.counters[f"symm:{algorithm}"] += 1
        return self._members["symm"].all_reduce_add_rms_norm(
            partial, residual, weight, eps, algorithm=algorithm, **options
        )

    def linear_reason(self, rows: int, width: int, dtype: torch.dtype) -> str | None:
        """As ``SymmetricMemoryCommunicator.linear_reason``, of a group whose ``overlap_modes`` have "fused"."""
        return self._members["symm"].linear_reason(rows, width, dtype)

    def linear_all_reduce(
        self, x: torch.Tensor, weight: torch.Tensor, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As ``SymmetricMemoryCommunicator.linear_all_reduce``.

        Raises:
            BackendUnavailableError: a group whose ``overlap_modes`` do not have "fused".
        """
        if "fused" not in self.overlap_modes:
            raise BackendUnavailableError(
                f"group {self.name}: a matmul fused with its all-reduce needs peer memory and Triton on all ranks, and "
                f"sums that peer memory may carry; the group has {', '.join(self._paths)} and "
                f"numerics={self.numerics_class!r}",
                group=self.name,
            )
        self.counters[LINEAR] += 1
        return self._members["symm"].linear_all_reduce(x, weight, **options)

    def check(self) -> None:
        """Raise what a transport has noticed since the last call; those that have nothing to say are passed over."""
        for member in self._members.values():
            look = getattr(member, "check", None)
            if look is not None:
                look()

    def guard_replay(self, timeout: float | None = None) -> None:
        """As ``NCCLCommunicator.guard_replay``; nothing to do on a group without NCCL: kernels have own deadlines."""
        nccl = self._members.get("nccl")
        if nccl is not None:
            nccl.guard_replay(timeout)

    def close(self) -> None:
        """Close the transports, the preferred one first; all of them, also when one fails. Safe to call twice."""
        errors = []
        for member in self._members.values():
            try:
                member.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    # The choice ------------------------------------------------------------------------------------------------------

    @property
    def transports(self) -> Mapping[str, Communicator]:
        """The communicators behind this one, in order of preference."""
        return self._members

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that all ranks of the group have."""
        return self._paths

    def path_for(self, operation: str, nbytes: int, dtype: torch.dtype = torch.bfloat16, reduce_op: str = "sum") -> str:
        """The path that a call would take; counts nothing.

        Raises:
            BackendUnavailableError: it would be an error.
        """
        return self._decide(_Call(operation, nbytes, dtype, self._device_type, reduce_op))

    def _carrier(self, operation: str, nbytes: int, x: torch.Tensor, op: str = "sum") -> Communicator:
        return self._ways[self._take(operation, nbytes, x.dtype, x.device.type, op)][0]

    def _take(
        self, operation: str, nbytes: int, dtype: torch.dtype | None, device_type: str, op: str = "sum", packs: int = 0
    ) -> str:
        """The path of a call that is about to run."""
        key = (operation, nbytes, dtype, device_type, op, packs)
        path = self._routes.get(key)
        if path is None:
            path = self._decide(_Call(*key))
            if len(self._routes) >= 4096:
                self._routes.clear()
            self._routes[key] = path
        if path == "gloo" and device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BackendUnavailableError(
                f"group {self.name}: {_Call(*key)} goes through host memory, which a CUDA graph cannot capture",
                group=self.name,
                operation=operation,
            )
        self.counters[path] += 1
        return path

    def _decide(self, call: _Call) -> str:
        problems = {path: self._problem(path, call) for path in self._paths}
        able = [path for path, problem in problems.items() if problem is None]
        path = paths.route(
            call.operation,
            call.nbytes,
            self.world_size,
            self.numerics_class,
            able,
            self.table,
            exact=call.exact,
            **({} if call.dtype is None else {"dtype": _name_of(call.dtype)}),
        )
        if path is None and self.numerics_class == "nccl" and "gloo" in able:
            path = "gloo"  # which promises more than NCCL does
        if path is not None and (path != "gloo" or self.backend == "gloo" or call.device_type != self._device_type):
            return path
        allowed = paths.allowed_paths(self._paths, self.numerics_class, call.exact)
        reasons = dict.fromkeys(
            f"{_member_of(other)}: {problem if other in allowed else self._out_of_class(other)}"
            for other, problem in problems.items()
            if other != path and problem != _OTHER_WAY
        )
        why = f"{call} is carried by no path that the group prefers ({'; '.join(reasons)})"
        if path is None:
            raise BackendUnavailableError(f"group {self.name}: {why}", group=self.name, operation=call.operation)
        if self.strict:
            raise BackendUnavailableError(
                f"group {self.name}: {why}; strict=True forbids the fallback to {path}",
                group=self.name,
                operation=call.operation,
            )
        kind = f"{call.operation} {call.reduce_op} {call.dtype}"
        if kind not in self._fallbacks:
            self._fallbacks[kind] = why
            if self.rank == 0:
                warnings.warn(f"tp_kernels: group {self.name}: {why}; it falls back to {path}", stacklevel=4)
        return path

    def _problem(self, path: str, call: _Call) -> str | None:
        """Why a path cannot take a call; None if it can."""
        name = _member_of(path)
        if name != "gloo" and call.device_type != self._device_type:
            return f"takes tensors on {self._device_type}"
        if call.operation == "all_reduce_norm" and path not in _KERNELS:
            return "has no kernel for it"
        if path in _KERNELS or path in _MULTICAST:
            if call.operation not in ("all_reduce", "all_reduce_norm") or call.reduce_op != "sum":
                return _OTHER_WAY
            if call.dtype not in _KERNEL_DTYPES:
                return _OTHER_WAY
            if path == LAMPORT and (call.nbytes > LAMPORT_BYTES or call.packs > MAX_LAMPORT_ROW_PACKS):
                return f"takes up to {paths.describe_bytes(LAMPORT_BYTES)}"
            return None
        if call.dtype is None:
            return None
        if name == "gloo":
            return None if call.dtype in _HOST_DTYPES else f"does not take {call.dtype}"
        # Bytes are bytes: only reductions look at the dtype.
        reduces = call.operation in ("all_reduce", "reduce_scatter")
        refused = reduces and call.dtype not in (_NCCL_DTYPES if name == "nccl" else _TORCH_DTYPES)
        return f"does not reduce {call.dtype}" if refused else None

    def _out_of_class(self, path: str) -> str:
        kind = paths.CLASS_OF[path]
        return f"sums of class {kind!r}, and the group has numerics={self.numerics_class!r}"

    # In words --------------------------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        """Lines: path by size for every operation, what is never taken and why, and what has run."""
        lines = [f'sums of floats: class "{self.numerics_class}"; paths by {self.table.source}']
        for operation in paths.OPERATIONS:
            if operation == "barrier" or (operation == "all_reduce_norm" and not self.fused_norm):
                continue
            # Large enough for every path, Lamport apart, whose limit the table keeps.
            call = _Call(operation, 0, torch.bfloat16, self._device_type)
            able = [path for path in self._paths if self._problem(path, call) is None]
            allowed = paths.allowed_paths(able, self.numerics_class, call.exact)
            chosen = paths.ranges(operation, allowed, self.table)
            lines.append(f"{operation}: {_spell(chosen)}")
            taken = {path for _, path in chosen}
            for dtype in paths.MEASURED_DTYPES:
                other = paths.ranges(operation, allowed, self.table, dtype)
                if other != chosen:
                    lines.append(f"  {dtype}: {_spell(other)}")
                    taken |= {path for _, path in other}
            for path in able:
                if path not in allowed:
                    lines.append(f"  never {path}: {self._out_of_class(path)}")
                elif path not in taken and path not in (SYMM, "gloo"):
                    lines.append(f"  never {path}: not the fastest at any size, by the table")
        if TWO_SHOT in self._paths and MULTIMEM not in self._paths:
            lines.append("symm:multimem: not there (these GPUs have no multicast, or not on all ranks)")
        nccl = getattr(self._members.get("nccl"), "describe", None)
        lines += [] if nccl is None else nccl()
        lines += [f"fell back: {why}" for why in self._fallbacks.values()]
        ran = ", ".join(f"{path} {count}" for path, count in sorted(self.counters.items()))
        lines.append(f"calls so far (a captured call counts once): {ran or 'none'}")
        return lines

    def __repr__(self) -> str:
        where = f"rank {self.rank} of {self.world_size}"
        return f"RoutedCommunicator({self.name!r}, {where}, {'+'.join(self._members)}, {self.numerics_class})"


# A path of the same transport takes the call: nothing to report.
_OTHER_WAY = "taken by another way of the same transport"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _member_of(path: str) -> str:
    return path.partition(":")[0]


def _gathered_bytes(x: torch.Tensor, dim: int, sizes: Sequence[int] | None, world_size: int) -> int:
    """Of the whole result: the same on all ranks, also where this rank's part is empty."""
    if sizes is None or not -x.dim() <= dim < x.dim():
        return x.nbytes * world_size
    count = sum(sizes) * x.element_size()
    for index, extent in enumerate(x.shape):
        count *= 1 if index == dim % x.dim() else extent
    return count


def _combined(members: Sequence[Communicator], several: bool) -> Numerics:
    """What sums promise that any of the members may carry."""
    if not several:
        return members[0].numerics
    promises = [member.numerics for member in members]
    accumulate = {promise.accumulate for promise in promises}
    return Numerics(
        accumulate.pop() if len(accumulate) == 1 else "by path",
        "algorithm",
        same_bits_on_all_ranks=all(promise.same_bits_on_all_ranks for promise in promises),
        size_dependent=True,
    )


def _spell(chosen: Sequence[tuple[int | None, str]]) -> str:
    parts = [f"{path} up to {paths.describe_bytes(limit)}" for limit, path in chosen if limit is not None]
    if chosen and chosen[-1][0] is None:
        parts.append(f"{chosen[-1][1]} {'above' if parts else 'at every size'}")
    return ", ".join(parts) or "no path"
