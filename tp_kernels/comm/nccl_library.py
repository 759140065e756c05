"""Which NCCL the native core uses: found at run time, never linked. Needs neither a GPU nor a CUDA build.

Looked for in this order: ``TP_KERNELS_NCCL_PATH`` (a file; an error if it cannot be loaded), the copy that torch has
loaded, the one of torch's wheel, the system's. At least 2.18.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tp_kernels._native import native

__all__ = ["NCCLLibraryInfo", "nccl_library_info", "wheel_hint"]


@dataclass(frozen=True)
class NCCLLibraryInfo:
    """NCCL as the native core sees it.

    Attributes:
        version: for example "2.28.9"; "" if there is none.
        version_code: NCCL_VERSION_CODE, 0 if there is none.
        path: the library's file.
        source: how it was found, in words.
        copies: files libnccl.so* mapped into this process; more than one corrupts both.
        error: why NCCL cannot be used, or None.
    """

    version: str
    version_code: int
    path: str
    source: str
    copies: tuple[str, ...]
    error: str | None

    def __str__(self) -> str:
        return self.error or f"NCCL {self.version}, {self.path} ({self.source})"


def nccl_library_info() -> NCCLLibraryInfo:
    """Load NCCL unless that is done already, and say which. Never raises: see ``error``."""
    version, path, source, error = 0, "", "", None
    try:
        version, path, source = native.nccl_load(wheel_hint())
    except RuntimeError as failure:
        error = str(failure)
    copies = tuple(native.nccl_mapped())
    if error is None and len(copies) > 1:
        error = f"{len(copies)} copies of NCCL are loaded, which corrupts both: {', '.join(copies)}"
    return NCCLLibraryInfo(
        version=native.nccl_version_text(version) if version else "",
        version_code=version,
        path=path,
        source=source,
        copies=copies,
        error=error,
    )


def wheel_hint() -> str:
    """Where the wheel that torch depends on puts NCCL; a path that need not exist, "" without torch."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return ""
    return str(Path(torch.origin).parents[1] / "nvidia" / "nccl" / "lib" / "libnccl.so.2")
