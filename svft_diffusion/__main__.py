"""``python -m svft_diffusion`` is the console script ``svft-diffusion``."""

import sys

from svft_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
