"""Attention over a KV cache: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "decode_attention", *sys.argv[1:]]))
