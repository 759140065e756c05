"""Process groups, communicators, choice of transport, deadlines and errors."""

from tp_kernels.comm.communicator import Communicator, Handle, LocalCommunicator, Numerics
from tp_kernels.comm.errors import CommAbortedError, CommError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.gloo import GlooCommunicator
from tp_kernels.comm.nccl import NCCLCommunicator, NCCLUnavailable
from tp_kernels.comm.policy import BackendUnavailableError, explain
from tp_kernels.comm.process_group import (
    ProcessGroupManager,
    TPGroup,
    get_tp_group,
    init,
    resolve_group,
    shutdown,
)
from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable

__all__ = [
    "BackendUnavailableError",
    "CommAbortedError",
    "CommError",
    "CommMismatchError",
    "CommTimeoutError",
    "Communicator",
    "GlooCommunicator",
    "Handle",
    "LocalCommunicator",
    "NCCLCommunicator",
    "NCCLUnavailable",
    "Numerics",
    "PeerDiedError",
    "ProcessGroupManager",
    "SharedMemoryCommunicator",
    "SharedMemoryUnavailable",
    "TPGroup",
    "explain",
    "get_tp_group",
    "init",
    "resolve_group",
    "shutdown",
]
