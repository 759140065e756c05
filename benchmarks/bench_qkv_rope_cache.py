"""QKV split, QK-norm, rotation and cache write: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "qkv_rope_cache", *sys.argv[1:]]))
