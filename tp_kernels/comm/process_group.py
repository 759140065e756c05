"""Who talks to whom: ``ProcessGroupManager`` sets the ranks up, ``TPGroup`` is one group with its communicator.

    with ProcessGroupManager.initialize() as manager:      # torchrun's environment, or one rank when there is none
        layer = ColumnParallelLinear(1024, 4096)           # uses manager.tp_group, the default group

With ``tp_size`` the world is a mesh of ``world_size / tp_size`` data-parallel replicas by ``tp_size`` tensor-parallel
ranks; the ranks of one TP group are neighbours. World size 1 never touches torch.distributed. A torch.distributed that
the user has initialised is reused and never destroyed.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tp_kernels.comm import rendezvous
from tp_kernels.comm.communicator import DEFAULT_TIMEOUT, LocalCommunicator, check_timeout
from tp_kernels.comm.errors import CommTimeoutError
from tp_kernels.comm.nccl_connect import check_options
from tp_kernels.comm.policy import BACKENDS, RankFacts, choose
from tp_kernels.comm.tp_group import TPGroup, create_group, next_generation
from tp_kernels.one_gpu import local_device

__all__ = ["ProcessGroupManager", "TPGroup", "get_tp_group", "init", "resolve_group", "shutdown"]


_default_manager: ProcessGroupManager | None = None
_local_group: TPGroup | None = None
# By id of the user's torch ProcessGroup, which the TPGroup keeps alive, so an id is not reused while it is a key.
_groups_of_users: dict[int, TPGroup] = {}


class ProcessGroupManager:
    """The ranks of this job; made by ``initialize``, ended by ``shutdown`` or as a context manager.

    Attributes:
        rank, world_size: this process in the world.
        local_rank: this process on its host (torchrun's LOCAL_RANK, else ``rank``).
        tp_size, dp_size: extents of the mesh; ``tp_size * dp_size == world_size``.
        device: of this rank's tensors: "cpu", or its GPU with its index (see ``initialize``).
        tp_group: the default ``TPGroup``, which layers use when ``group=None``.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        tp_size: int,
        backend: str,
        timeout: float,
        strict: bool,
        device: torch.device,
        numerics: str | None = None,
        nccl_options: dict[str, Any] | None = None,
    ):
        self.rank, self.world_size = rank, world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        if device.type == "cuda" and device.index is None:
            device = local_device(self.local_rank)
        self.device = device
        self.tp_size, self.dp_size = tp_size, world_size // tp_size
        self.tp_group: TPGroup = None  # set by initialize, before anyone sees the manager
        self._backend, self._timeout, self._strict, self._numerics = backend, timeout, strict, numerics
        self._nccl_options = nccl_options or {}
        self._dp_group: TPGroup | None = None
        self._dp_process_group: Any = None
        self._mesh: Any = None
        self._store: Any = None
        self._groups: list[TPGroup] = []
        self._process_groups: list[Any] = []  # torch groups made here, in order of creation
        self._owns_world = False
        self._closed = False

    @classmethod
    def initialize(
        cls,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
        *,
        tp_size: int | None = None,
        backend: str = "auto",
        timeout: float = DEFAULT_TIMEOUT,
        strict: bool = False,
        device: str | torch.device | None = None,
        numerics: str | None = None,
        max_ctas: int | None = None,
        registered_buffers: bool = False,
    ) -> ProcessGroupManager:
        """Set up this process's groups; every rank calls it with the same arguments, ``rank`` apart.

        Args:
            rank, world_size: None takes them from an initialised torch.distributed, else from torchrun's RANK and
                WORLD_SIZE, else means one rank.
            init_method: "env://" (the default), "tcp://host:port" or "file:///path".
            tp_size: ranks per tensor-parallel group, a divisor of ``world_size``; None for all of them.
            backend: "auto", or the only transport to use: "shm" and "gloo" for CPU tensors, "symm" (peer memory),
                "nccl" and "gloo" for CUDA tensors. "auto" takes shared memory when all ranks are on one host, else
                Gloo; for CUDA tensors peer memory and NCCL side by side as far as they are there, else Gloo.
            timeout: default deadline of the set-up and of every collective, in seconds.
            strict: a fallback raises ``BackendUnavailableError`` instead of warning once.
            device: where the groups' tensors live: "cpu" (the default), "cuda" for the GPU that belongs to this rank
                (number LOCAL_RANK, or the only one it sees), or "cuda:<index>". The process's current device is left
                alone, as torch.distributed leaves it: call ``torch.cuda.set_device(manager.device)`` if every "cuda"
                of the program is to mean that GPU.
            numerics: "ordered" takes only paths whose floating-point sums have the same bits on all ranks and for all
                message sizes; "any" also those that are faster and do not promise it; None is "ordered" where peer
                memory is available, else NCCL's own order. CPU groups are always ordered.
            max_ctas: most SMs that a collective of NCCL's takes from the GPU, 1 to 64: fewer leave more to what runs
                beside it (``overlap="chunked"``). None is NCCL's choice. Other transports ignore it, and NCCL does if
                NCCL_MAX_CTAS is set, which is warned of.
            registered_buffers: give NCCL memory that it reads and writes in place (see comm/nccl_buffers.py); where
                that fails, ``explain`` says so.
        Raises:
            ValueError: for arguments that do not fit or differ between ranks. CommTimeoutError: names the ranks that
                did not come. RuntimeError: already initialised.
        """
        global _default_manager
        if _default_manager is not None:
            raise RuntimeError("tp_kernels is already initialised in this process; call shutdown() first")
        device = _check_device(device)
        if numerics not in (None, "ordered", "any"):
            raise ValueError(f"numerics must be None, 'ordered' or 'any', got {numerics!r}")
        nccl_options = check_options(max_ctas, registered_buffers)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        check_timeout(timeout)
        rank, world_size = _world_of(rank, world_size)
        tp_size = world_size if tp_size is None else tp_size
        if not isinstance(tp_size, int) or tp_size < 1 or world_size % tp_size:
            raise ValueError(f"tp_size must divide the world size {world_size}, got {tp_size!r}")
        manager = cls(rank, world_size, tp_size, backend, timeout, strict, device, numerics, nccl_options)
        try:
            manager._connect(init_method)
        except BaseException:
            manager.shutdown()
            raise
        _default_manager = manager
        _ensure_exit_hook()
        return manager

    @property
    def dp_group(self) -> TPGroup:
        """The ranks with this rank's place in other replicas; made on first use, by all of them together."""
        if self._dp_group is None:
            self._check_open()
            ranks = range(self.rank % self.tp_size, self.world_size, self.tp_size)
            self._dp_group = self._make_group(ranks, self._dp_process_group, f"dp{self.rank % self.tp_size}")
        return self._dp_group

    @property
    def mesh(self) -> Any:
        """torch ``DeviceMesh`` with dimensions ("dp", "tp") over the same process groups."""
        if self._mesh is None:
            self._check_open()
            if not dist.is_initialized():
                raise RuntimeError(
                    "mesh needs torch.distributed, which tp_kernels does not initialise for a single rank; call "
                    "torch.distributed.init_process_group first, or initialise with more than one rank"
                )
            from torch.distributed.device_mesh import DeviceMesh

            layout = torch.arange(self.world_size).view(self.dp_size, self.tp_size)
            if self.tp_group.process_group is None:  # one rank in a larger world
                self.tp_group.process_group = self._single_process_group()
            tp = self.tp_group.process_group
            dp = self._dp_process_group or self._single_process_group()
            self._mesh = DeviceMesh.from_group([dp, tp], self.device.type, mesh=layout, mesh_dim_names=("dp", "tp"))
        return self._mesh

    def new_group(self, ranks: Sequence[int], name: str | None = None) -> TPGroup | None:
        """A group of the given world ranks; every rank of the world calls it. Returns None on ranks outside it."""
        self._check_open()
        ranks = list(ranks)
        if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= r < self.world_size for r in ranks):
            raise ValueError(f"new_group: expected distinct ranks in [0, {self.world_size}), got {ranks}")
        if ranks != sorted(ranks):
            raise ValueError(f"new_group: expected ranks in ascending order, got {ranks}")
        process_group = self._new_process_group(ranks) if self.world_size > 1 else None
        if self.rank not in ranks:
            return None
        return self._make_group(ranks, process_group, name or "ranks" + "-".join(map(str, ranks)))

    def shutdown(self) -> None:
        """Close the communicators and destroy the torch groups made here. Not a collective; safe to call twice."""
        global _default_manager
        if self._closed:
            return
        self._closed = True
        if _default_manager is self:
            _default_manager = None
        for group in reversed(self._groups):
            group.close()
        if self._owns_world:
            _forget_groups_of_users(everything=True)
            if dist.is_initialized():
                dist.destroy_process_group()
        elif dist.is_initialized():
            for process_group in reversed(self._process_groups):
                if _is_alive(process_group):
                    dist.destroy_process_group(process_group)
        self._groups, self._process_groups, self._mesh, self._store = [], [], None, None

    def __enter__(self) -> ProcessGroupManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self.tp_group)
        return (
            f"ProcessGroupManager(rank {self.rank} of {self.world_size}, dp={self.dp_size}, tp={self.tp_size}, {state})"
        )

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _connect(self, init_method: str | None) -> None:
        if self.world_size == 1:
            process_group = dist.group.WORLD if dist.is_initialized() else None
            self.tp_group = self._make_group([0], process_group, "tp")
            return
        deadline = time.monotonic() + self._timeout
        reused = dist.is_initialized()
        if reused:
            url, generation = None, next_generation("world")
            self._store = dist.PrefixStore(f"tp_kernels/world/{generation}", _default_store())
        else:
            self._store, url = rendezvous.open_store(init_method, self.rank, self.world_size, self._timeout)
        mine = {"tp_size": self.tp_size, "world_size": self.world_size, **self._nccl_options}
        everyone = self._exchange("initialize", mine, deadline)
        if url is not None:
            rendezvous.confirm(url)
        if any(theirs != mine for theirs in everyone):
            listing = ", ".join(f"rank {r}: {facts}" for r, facts in enumerate(everyone))
            raise ValueError(f"all ranks must initialise with the same sizes and options, got {listing}")
        if not reused:
            self._initialise_torch()
        first = self.rank - self.rank % self.tp_size
        tp_process_group, self._dp_process_group = self._mesh_process_groups()
        name = "tp" if self.dp_size == 1 else f"tp{first // self.tp_size}"
        self.tp_group = self._make_group(range(first, first + self.tp_size), tp_process_group, name)

    def _mesh_process_groups(self) -> tuple[Any, Any]:
        """This rank's torch groups along tp and dp; None along an extent of one."""
        if self.dp_size == 1:
            return dist.group.WORLD, None
        if self.tp_size == 1:
            return None, dist.group.WORLD
        mine = []
        # torch wants every rank to take part in the creation of every group, in the same order.
        rows = [range(start, start + self.tp_size) for start in range(0, self.world_size, self.tp_size)]
        columns = [range(start, self.world_size, self.tp_size) for start in range(self.tp_size)]
        for ranks in rows + columns:
            process_group = self._new_process_group(ranks)
            if process_group is not None:
                mine.append(process_group)
        return mine[0], mine[1]

    def _exchange(self, what: str, payload: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
        left = max(0.0, deadline - time.monotonic())
        return rendezvous.exchange(self._store, self.rank, self.world_size, payload, left, group="world", what=what)

    def _initialise_torch(self) -> None:
        """Gloo among all ranks, which have met already: only a rank that dies just now can make it fail."""
        self._owns_world = True
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("torch", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self._timeout),
            )
        except RuntimeError as error:
            raise CommTimeoutError(
                f"group world: torch.distributed (gloo) could not connect rank {self.rank} of {self.world_size} within "
                f"{self._timeout:g} s: {error}",
                group="world",
                operation="initialize",
            ) from error

    def _new_process_group(self, ranks: Sequence[int]) -> Any:
        try:
            group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise CommTimeoutError(
                f"group world: torch.distributed could not make a group of ranks {list(ranks)} on rank {self.rank}, "
                f"with a deadline of {self._timeout:g} s; every rank of the world must take part: {error}",
                group="world",
                operation="new_group",
            ) from error
        if self.rank not in ranks:
            return None
        self._process_groups.append(group)
        return group

    def _single_process_group(self) -> Any:
        group = dist.new_group([self.rank], backend="gloo", use_local_synchronization=True)
        self._process_groups.append(group)
        return group

    def _make_group(self, ranks: Sequence[int], process_group: Any, name: str) -> TPGroup:
        group = create_group(
            list(ranks),
            self.rank,
            process_group,
            name=name,
            store=self._store,
            backend=self._backend,
            timeout=self._timeout,
            strict=self._strict,
            device=self.device,
            numerics=self._numerics,
            nccl_options=self._nccl_options,
        )
        self._groups.append(group)
        return group

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this ProcessGroupManager was shut down; call ProcessGroupManager.initialize again")


# Groups --------------------------------------------------------------------------------------------------------------


def resolve_group(group: Any = None) -> TPGroup:
    """The ``TPGroup`` meant by what a user passes as ``group=``.

    Args:
        group: None (the default TP group, or a group of one when nothing was initialised), a ``TPGroup``, a
            ``ProcessGroupManager``, a torch ``ProcessGroup``, or a torch ``DeviceMesh`` that is one-dimensional or has
            a dimension named "tp". For a torch group a communicator is made on first use, by all its ranks together,
            and kept until the group is destroyed; for the device of the default manager if there is one, else for CUDA
            (the current device) if that is the mesh's, else for the CPU.
    Raises:
        ValueError: for anything else.
    """
    if isinstance(group, TPGroup):
        return group
    if group is None:
        return _default_manager.tp_group if _default_manager is not None else _single_group()
    if isinstance(group, ProcessGroupManager):
        group._check_open()
        return group.tp_group
    if dist.is_available():
        if isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER:
            return _group_of_user(group)
        if type(group).__name__ == "DeviceMesh" and hasattr(group, "mesh_dim_names"):
            return _group_of_user(_process_group_of_mesh(group), group.device_type)
    raise ValueError(
        "group must be None, a TPGroup, a ProcessGroupManager, a torch ProcessGroup, or a DeviceMesh that is "
        f"one-dimensional or has a dimension 'tp'; got {type(group).__name__}"
    )


def _process_group_of_mesh(mesh: Any) -> Any:
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        return mesh.get_group("tp")
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(f"group: a DeviceMesh with {mesh.ndim} dimensions needs one named 'tp', got {names}")


def _group_of_user(process_group: Any, device_type: str = "cpu") -> TPGroup:
    _forget_groups_of_users()
    if _default_manager is not None:
        for group in _default_manager._groups:
            if group.process_group is process_group:
                return group
    cached = _groups_of_users.get(id(process_group))
    if cached is not None:
        return cached
    if not _is_alive(process_group):
        raise ValueError("group: this ProcessGroup was destroyed, or the calling rank is not a member of it")
    ranks = dist.get_process_group_ranks(process_group)
    name = process_group.group_desc or process_group.group_name
    manager = _default_manager
    if manager is not None:
        device = manager.device
    else:
        device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    group = create_group(
        ranks,
        dist.get_rank(),
        process_group,
        name=f"user:{name}" if name != "undefined" else f"user:{process_group.group_name}",
        store=dist.PrefixStore(f"tp_kernels/user/{process_group.group_name}", _default_store()),
        backend=manager._backend if manager else "auto",
        timeout=manager._timeout if manager else DEFAULT_TIMEOUT,
        strict=manager._strict if manager else False,
        device=device,
        numerics=manager._numerics if manager else None,
        nccl_options=manager._nccl_options if manager else None,
    )
    _groups_of_users[id(process_group)] = group
    _ensure_exit_hook()
    return group


def _forget_groups_of_users(everything: bool = False) -> None:
    for key, group in list(_groups_of_users.items()):
        if everything or not _is_alive(group.process_group):
            del _groups_of_users[key]
            group.close()


def _single_group() -> TPGroup:
    global _local_group
    if _local_group is None:
        choice = choose([RankFacts.here("cpu", "auto", False)])
        _local_group = TPGroup(LocalCommunicator(), choice=choice)
    return _local_group


def _is_alive(process_group: Any) -> bool:
    return dist.is_initialized() and process_group in dist.distributed_c10d._world.pg_map


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _world_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and size of the world from the arguments, torch.distributed or torchrun's environment."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"pass both rank and world_size, or neither; got rank={rank!r}, world_size={world_size!r}")
    if dist.is_available() and dist.is_initialized():
        actual = dist.get_rank(), dist.get_world_size()
        if rank is not None and (rank, world_size) != actual:
            raise ValueError(
                f"torch.distributed is already initialised with rank {actual[0]} of {actual[1]}, "
                f"but rank={rank}, world_size={world_size} was passed"
            )
        return actual
    if rank is None:
        values = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if values == (None, None):
            return 0, 1
        if not all(value is not None and value.isdigit() for value in values):
            raise ValueError(f"expected RANK and WORLD_SIZE in the environment as integers, got {values}")
        rank, world_size = int(values[0]), int(values[1])
    if not isinstance(world_size, int) or world_size < 1 or not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank={rank!r}, world_size={world_size!r}")
    return rank, world_size


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda' was asked for, but torch.cuda.is_available() is False")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise ValueError(f"device {device!r} was asked for, and this process sees {torch.cuda.device_count()}")
    return found if found.type == "cuda" else torch.device("cpu")


# Short forms for one default manager per process ---------------------------------------------------------------------


def init(*args: Any, **kwargs: Any) -> ProcessGroupManager:
    """``ProcessGroupManager.initialize``: same arguments, becomes the process's default."""
    return ProcessGroupManager.initialize(*args, **kwargs)


def get_tp_group() -> TPGroup:
    """The default tensor-parallel group; a group of one when nothing was initialised."""
    return resolve_group(None)


def shutdown() -> None:
    """End the default manager and the groups made from torch groups. Safe to call twice, or without ``init``."""
    if _default_manager is not None:
        _default_manager.shutdown()
    _forget_groups_of_users(everything=True)


_exit_hook_set = False


def _ensure_exit_hook() -> None:
    global _exit_hook_set
    if not _exit_hook_set:
        _exit_hook_set = True
        atexit.register(shutdown)
