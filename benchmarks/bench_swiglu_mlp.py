"""The SwiGLU block's training step and the gated backward GEMM: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "swiglu_mlp", *sys.argv[1:]]))
