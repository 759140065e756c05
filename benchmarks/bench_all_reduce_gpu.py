"""All-reduce over GPU ranks, alone and fused with the norm: ``python benchmarks/bench_all_reduce_gpu.py --help``."""

import sys

from tp_kernels.testing.bench_all_reduce_gpu import main

if __name__ == "__main__":
    sys.exit(main())
