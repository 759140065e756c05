"""silu(gate) * up and its gradient: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "silu_mul", *sys.argv[1:]]))
