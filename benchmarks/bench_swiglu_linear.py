"""The SwiGLU up-projection: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "swiglu_linear", *sys.argv[1:]]))
