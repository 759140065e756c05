"""``CheckpointError``: what is wrong with a checkpoint, with the file and the tensor concerned."""

from __future__ import annotations

import os

__all__ = ["PICKLE_SUFFIXES", "CheckpointError", "pickle_refusal"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded: it is missing, malformed, hostile, or does not fit the model.

    Attributes:
        file: path of the file concerned, or "" when it is not about one file.
        tensor: name of the tensor concerned, or "".
        ranks: group ranks that met the error; empty when it did not come from a collective load.
    """

    def __init__(self, message: str, *, file: str | os.PathLike = "", tensor: str = "", ranks: tuple[int, ...] = ()):
        self.file = os.fspath(file)
        self.tensor = tensor
        self.ranks = tuple(ranks)
        where = self.file + (": " if self.file else "") + (f"tensor {tensor!r}: " if tensor else "")
        super().__init__(where + message)


def pickle_refusal(path: str | os.PathLike) -> CheckpointError:
    """The error for a checkpoint in pickle format."""
    return CheckpointError(
        "pickle checkpoints are refused: unpickling can run any code that the file's author put in it. "
        "Convert it to safetensors where you trust the file, for example with "
        "model.save_pretrained(folder, safe_serialization=True) from transformers",
        file=path,
    )
