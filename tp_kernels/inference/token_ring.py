"""``TokenRing``: tokens on their way from the device to the host, which reads them some launches later."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["TokenRing"]

_SLOTS = 4


class _Sent(NamedTuple):
    rows: list[int]
    tokens: torch.Tensor
    event: Any


class TokenRing:
    """The tokens of up to four launches in memory that the device writes to while the host goes on.

    Args:
        rows: most rows of a launch.
        device: where tokens come from.
    """

    def __init__(self, rows: int, device: torch.device):
        self._device = device
        self._slots = torch.zeros(_SLOTS, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.clear()

    def clear(self) -> None:
        """Forget what was sent."""
        self._sent: deque[_Sent] = deque(maxlen=_SLOTS)
        self._count = self._lost = 0

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """Have ``tokens``, one for each of ``rows``, copied to the host behind what the current stream holds."""
        slot = self._slots[self._count % _SLOTS, : len(tokens)]
        self._count += 1
        slot.copy_(tokens, non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._lost += len(self._sent) == _SLOTS
        self._sent.append(_Sent(list(rows), slot, event))

    def read(self) -> dict[int, int]:
        """The oldest tokens that have not been read, by row; waits for them.

        Raises:
            ValueError: there are none; or some were overwritten before they were read (once; then the rest can be).
        """
        if self._lost:
            lost, self._lost = self._lost, 0
            raise ValueError(f"the tokens of {lost} launches were not read before {_SLOTS} others, and are lost")
        if not self._sent:
            raise ValueError("nothing was launched that has not been read")
        sent = self._sent.popleft()
        if sent.event is not None:
            sent.event.synchronize()
        return dict(zip(sent.rows, sent.tokens.tolist(), strict=True))
