"""Prefill attention, forward and backward: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "flash_attention", *sys.argv[1:]]))
