"""Fused kernels and overlapped communication for tensor-parallel transformers, as drop-in PyTorch modules."""

from tp_kernels import _native  # noqa: F401  (a missing native core is an error here, with the cure in its text)
from tp_kernels.version import __version__

__all__ = ["__version__"]
