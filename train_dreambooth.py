"""DreamBooth training of an adapter: ``accelerate launch train_dreambooth.py --help``."""

import sys

from svft_diffusion.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
