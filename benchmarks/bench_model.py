"""A whole model with random weights of real shapes against its rivals: ``benchmarks/bench_model.py --help``."""

import sys

from tp_kernels.commands.bench_model import main

if __name__ == "__main__":
    sys.exit(main())
