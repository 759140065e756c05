"""All-reduce over CPU ranks, shared memory against Gloo: ``python benchmarks/bench_all_reduce.py --help``."""

import sys

from tp_kernels.testing.bench_all_reduce import main

if __name__ == "__main__":
    sys.exit(main())
