"""``python -m tp_kernels`` is ``tp-kernels``; under torchrun: ``torchrun ... -m tp_kernels generate ...``."""

import sys

from tp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
