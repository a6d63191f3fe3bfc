"""The command line: ``svft-diffusion COMMAND``, the same as ``python -m svft_diffusion COMMAND``."""
