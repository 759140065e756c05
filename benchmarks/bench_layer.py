"""A decoder layer over several ranks, against itself without communication: ``benchmarks/bench_layer.py --help``."""

import sys

from tp_kernels.commands.bench_layer import main

if __name__ == "__main__":
    sys.exit(main())
