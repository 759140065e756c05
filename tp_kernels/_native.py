"""The only importer of ``tp_kernels._C``: what was built, and a clear error when something needs what was not.

``_C`` takes raw addresses, counts, a dtype code and a stream handle, so it is independent of the torch version.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

try:
    # Not `from tp_kernels import _C`: without a build that text speaks of a circular import.
    native = importlib.import_module("tp_kernels._C")
except ImportError as error:
    raise ImportError(
        "tp_kernels has no native core here (tp_kernels._C could not be imported: "
        f"{error}). If this is a source checkout, build it with `pip install -e .` in the folder that holds setup.py; "
        "if you installed with `pip install .`, run Python from another folder, because the checkout hides the "
        "installed package."
    ) from error

__all__ = ["DTYPE_CODES", "build_info", "dtype_code", "has_cuda", "native", "require_cuda"]

# Twin of csrc/common/dtype.h.
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "int32": 4, "int64": 5}


@functools.cache
def _torch_codes() -> dict[Any, int]:
    import torch

    return {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


def dtype_code(dtype: Any) -> int:
    """Code of a ``torch.dtype`` for the native core; ValueError names the supported ones."""
    code = _torch_codes().get(dtype)
    if code is None:
        raise ValueError(f"unsupported dtype {dtype}; expected one of {', '.join(DTYPE_CODES)}")
    return code


def build_info() -> dict[str, Any]:
    """What was built: version, compiler, CUDA summary line, ``has_cuda``."""
    return dict(native.build_info())


def has_cuda() -> bool:
    """Whether the CUDA sources were compiled into the native core (not whether a GPU is present)."""
    return bool(build_info()["has_cuda"])


def require_cuda(what: str) -> None:
    """Raise RuntimeError saying why, if ``what`` needs the CUDA sources and they were not built."""
    info = build_info()
    if not info["has_cuda"]:
        raise RuntimeError(
            f"{what} needs the CUDA part of tp_kernels, which was {info['cuda']}; "
            "reinstall with TPK_CUDA=ON on a machine with nvcc"
        )
