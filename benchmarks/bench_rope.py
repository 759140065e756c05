"""Rotation of queries and keys, forward and backward: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "rope", *sys.argv[1:]]))
