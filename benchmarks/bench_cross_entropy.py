"""Cross-entropy over the vocabulary, forward and with the gradient: same as ``tp-kernels bench ops --op``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", "--op", "cross_entropy", *sys.argv[1:]]))
