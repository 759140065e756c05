"""Linear projections, plain and with a residual: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "linear", *sys.argv[1:]]))
