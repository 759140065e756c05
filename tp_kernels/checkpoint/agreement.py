"""Ranks agree on success or failure, so that an error on one rank is an error on all, raised at the same place."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from tp_kernels.checkpoint.errors import CheckpointError

__all__ = ["agree"]

# A message travels as int32 code points; the first rank's text is what helps, not its length.
_MAX_MESSAGE = 4000


def agree(group: Any, error: BaseException | None, *, same: str | None = None, timeout: float | None = None) -> None:
    """Collective: return if no rank has an error, raise ``CheckpointError`` on every rank otherwise.

    Args:
        group: a ``TPGroup``.
        error: what this rank met, or None.
        same: a text that must be equal on all ranks (for example what the file holds).
        timeout: deadline of the exchange in seconds; None is the group's own.
    Raises:
        CheckpointError: names every rank that failed, with its message; or says that ``same`` differs. At world size 1
        it is
            this rank's own error.
    """
    message = "" if error is None else _describe(error)
    if group.world_size == 1:
        if error is not None:
            raise _own(error, message)
        return
    communicator = group.communicator
    device = torch.device("cuda", torch.cuda.current_device()) if group.device_type == "cuda" else torch.device("cpu")
    points = [ord(letter) for letter in message[:_MAX_MESSAGE]]
    digest = int.from_bytes(hashlib.blake2b((same or "").encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([len(points), digest], dtype=torch.int64, device=device)
    statuses = communicator.all_gather(mine, timeout=timeout).view(-1, 2).tolist()
    lengths = [length for length, _ in statuses]
    if any(lengths):
        # Every rank sends at least one number: an empty contribution is not a case every transport need support.
        sizes = [max(length, 1) for length in lengths]
        text = torch.tensor(points or [0], dtype=torch.int32, device=device)
        gathered = communicator.all_gather(text, sizes=sizes, timeout=timeout).tolist()
        failures, position = {}, 0
        for rank, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            if length:
                failures[rank] = "".join(map(chr, gathered[position : position + length]))
            position += size
        raise _combined(failures, group.world_size, error)
    if len({digest for _, digest in statuses}) > 1:
        first = statuses[0][1]
        odd = tuple(rank for rank, (_, digest) in enumerate(statuses) if digest != first)
        raise CheckpointError(f"ranks {list(odd)} see another checkpoint or model than rank 0 does", ranks=odd)


def _describe(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _own(error: BaseException, message: str) -> BaseException:
    if isinstance(error, CheckpointError):
        return error
    wrapped = CheckpointError(message)
    wrapped.__cause__ = error
    return wrapped


def _combined(failures: dict[int, str], world_size: int, own: BaseException | None) -> CheckpointError:
    by_message: dict[str, list[int]] = {}
    for rank, message in failures.items():
        by_message.setdefault(message, []).append(rank)
    parts = []
    for message, ranks in by_message.items():
        if len(ranks) == world_size:
            parts.append(message)
        else:
            parts.append(f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}: {message}")
    error = CheckpointError("; ".join(parts), ranks=tuple(failures))
    if isinstance(own, CheckpointError):
        error.file, error.tensor = own.file, own.tensor
    error.__cause__ = own
    return error
