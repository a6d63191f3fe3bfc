"""Open the web app: ``python app.py``, the same as ``svft-diffusion app``."""

import sys

from svft_diffusion.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("app", sys.argv[1:]))
