"""``OneGpuRanks``: pools of ranks that share one GPU under one MPS daemon, for tests.

    with OneGpuRanks() as ranks:
        results = ranks(4).run(my_function, argument)      # my_function(group, argument) on ranks 0 to 3

Pools are kept for the next test. When a run fails, all pools are ended and the daemon is replaced: a rank that died, or
was killed, in the middle of a kernel can leave an MPS server, and with it every other client, unusable.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tp_kernels.one_gpu import SharedGpu
from tp_kernels.testing.rank_pool import RankOutcome, RankPool

__all__ = ["OneGpuRanks"]


class OneGpuRanks:
    """Makes and keeps the pools; a context manager that ends them, then the MPS daemon.

    Args:
        device: of the ranks' groups; "cpu" runs the same processes in the same environment without a GPU.
        gpu: index of the GPU among the visible ones.
    """

    def __init__(self, device: str = "cuda", gpu: int = 0):
        self._device = device
        self._gpu = SharedGpu(gpu)
        self._started = False
        self._pools: dict[tuple, RankPool] = {}

    def __call__(self, world_size: int, **options: Any) -> RankPool:
        """A ``RankPool`` of ``world_size`` ranks on the GPU, the same one for the same arguments.

        Args:
            options: further keyword arguments of ``RankPool``, for example ``backend="gloo"``.
        """
        if not self._started:
            self._started = True
            self._gpu.start()
        options = {"device": self._device, **options}
        key = (world_size, *sorted(options.items()))
        if key not in self._pools:
            environment = partial(self._gpu.rank_environment, world_size)
            self._pools[key] = _Pool(world_size, self._reset, environment=environment, **options)
        return self._pools[key]

    @property
    def shared_gpu(self) -> SharedGpu:
        """The GPU and its MPS daemon: ``mps``, ``sms``, ``describe(world_size)``."""
        return self._gpu

    def _reset(self) -> None:
        self._end_pools()
        self._gpu.restart()

    def _end_pools(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def close(self) -> None:
        """End all ranks, then the daemon. Safe to call twice; a later call starts afresh."""
        try:
            self._end_pools()
        finally:
            self._gpu.close()
            self._started = False

    def __enter__(self) -> OneGpuRanks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Pool(RankPool):
    """Reports a run in which not every rank returned, however it was started."""

    def __init__(self, world_size: int, on_failure: Any, **options: Any):
        super().__init__(world_size, **options)
        self._on_failure = on_failure

    def _call(self, *arguments: Any, **options: Any) -> list[RankOutcome]:
        good = False
        try:
            outcomes = super()._call(*arguments, **options)
            good = len(outcomes) == self.world_size and all(outcome.ok for outcome in outcomes)
            return outcomes
        finally:
            if not good:
                self._on_failure()
