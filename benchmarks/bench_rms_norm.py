"""RMSNorm, with and without the residual addition, forward and backward: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "rms_norm", *sys.argv[1:]]))
