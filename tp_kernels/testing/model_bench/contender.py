"""What is timed: something that runs a prompt and then tokens one by one; and the plain PyTorch ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tp_kernels._capture import capture_graph
from tp_kernels.testing.model_bench.plain_model import PlainModel, PlainState

__all__ = ["Contender", "PlainContender", "Turn", "release"]


class Turn(NamedTuple):
    """One thing to time.

    Attributes:
        play: the call that is timed.
        reset: called before each turn, outside the timing.
        mode: how it runs: "graph", "eager", or why not as a graph.
    """

    play: Callable[[], Any]
    reset: Callable[[], Any] = lambda: None
    mode: str = "eager"


class Contender(Protocol):
    """One implementation of the model. All of them choose the most likely token, and do it on the device."""

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        """The tokens [B, steps + 1] that follow the prompts ``ids`` [B, S], through the calls that are timed."""
        ...

    def first_tokens(self, prompts: Sequence[Tensor]) -> Tensor:
        """The token [n] that follows each of ``prompts`` (ids [S], of different lengths), by ``prefill_mixed``."""
        ...

    def prefill(self, ids: Tensor) -> Turn:
        """A turn that runs the prompts ``ids`` into an empty cache and chooses the first tokens."""
        ...

    def prefill_mixed(self, prompts: Sequence[Tensor]) -> Turn:
        """The same for prompts of different lengths in one batch: packed or padded, as the implementation does it."""
        ...

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        """A turn of ``steps`` decode steps of ``batch`` rows that hold ``context`` tokens when it begins."""
        ...

    def close(self) -> None:
        """Give back what ``prefill`` and ``decode`` hold: caches, graphs."""
        ...


class PlainContender:
    """``PlainModel``, by one of three ways to decode.

    Args:
        model: the model.
        how: one of ``WAYS``: "eager"; "graph", a CUDA graph that is good for any length, because it masks what is
            behind it; or "graph one length", a graph that attends to exactly as many tokens as there are, which would
            have to be captured anew for every token: a bound for what plain PyTorch can reach. On a CPU all run
            eagerly.
        states: caches by (batch, slots), to be shared with contenders that never run at the same time.
    """

    WAYS = ("graph", "eager", "graph one length")

    # Slots of a cache come in whole pages of our engine's size, so that a mask's rows are aligned.
    PAGE = 64

    def __init__(
        self,
        model: PlainModel,
        how: str = "eager",
        states: dict[tuple[int, int], PlainState] | None = None,
    ):
        if how not in self.WAYS:
            raise ValueError(f"how must be one of {', '.join(map(repr, self.WAYS))}, got {how!r}")
        self._model, self._how = model, how
        self._states = {} if states is None else states
        self._graphs: list[Any] = []

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        batch, length = ids.shape
        state = self._state(batch, length + steps)
        found = [self._model.prefill(ids, state).clone()]
        turn = None
        for step in range(steps):
            if turn is None or self._how == "graph one length":
                turn = self._step(state, length + step)
            turn()
            found.append(state.tokens.clone())
        self.close()
        return torch.stack(found, dim=1)

    def first_tokens(self, prompts: Sequence[Tensor]) -> Tensor:
        ids, last = self._padded(prompts)
        return self._model.prefill(ids, self._state(*ids.shape), last).clone()

    def prefill(self, ids: Tensor) -> Turn:
        state = self._state(*ids.shape)
        return Turn(lambda: self._model.prefill(ids, state))

    def prefill_mixed(self, prompts: Sequence[Tensor]) -> Turn:
        ids, last = self._padded(prompts)
        state = self._state(*ids.shape)
        return Turn(lambda: self._model.prefill(ids, state, last))

    @staticmethod
    def _padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(ids padded behind the prompts, where nothing sees the padding; the place of each one's last token)."""
        ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        return ids, torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        state = self._state(batch, context + steps)
        step = self._step(state, context)
        one_length = self._how == "graph one length"

        def play() -> None:
            for _ in range(steps):
                step()
                if one_length:
                    state.position.fill_(context)  # the graph is of this length and no other

        def reset() -> None:
            state.position.fill_(context)

        return Turn(play, reset, "graph" if self._how != "eager" and state.tokens.is_cuda else "eager")

    def _state(self, batch: int, tokens: int) -> PlainState:
        size = (batch, -(-tokens // self.PAGE) * self.PAGE)
        if size not in self._states:
            self._states[size] = self._model.state(*size)
        return self._states[size]

    def _step(self, state: PlainState, context: int) -> Callable[[], Any]:
        """A decode step of ``state``, which holds ``context`` tokens now; leaves the state as it is."""
        length = context + 1 if self._how == "graph one length" else None

        def step() -> None:
            self._model.decode(state, length)

        if self._how == "eager" or not state.tokens.is_cuda:
            return step
        tokens = state.tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # creates handles and workspaces, plans cuDNN's attention
                state.position.fill_(context)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = capture_graph(step, stream=stream)
        state.position.fill_(context)
        state.tokens.copy_(tokens)
        self._graphs.append(graph)
        return graph.replay

    def close(self) -> None:
        self._graphs.clear()
        self._states.clear()


def release() -> None:
    """Give memory that nobody holds any more back to the GPU, if there is one."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
