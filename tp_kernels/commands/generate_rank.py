"""A rank that ``generation.generate_on_ranks`` started: ``python -m tp_kernels.commands.generate_rank request result``.

A module of its own because runpy warns about one that its package has imported already.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from tp_kernels.commands.generation import GenerateRequest, generate_on_this_rank

__all__ = ["main"]


def main() -> None:
    """Read the request and generate; rank 0 writes the result."""
    # Ctrl-C reaches a rank only through its launcher; it has nothing to clean up, so end at once and say nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = GenerateRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    result = generate_on_this_rank(request, distributed=True, out=sys.stdout if request.stream else None)
    if result is not None:
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
