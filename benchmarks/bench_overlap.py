"""Projections beside their collectives: ``python benchmarks/bench_overlap.py --help``."""

import sys

from tp_kernels.testing.bench_overlap import main

if __name__ == "__main__":
    sys.exit(main())
