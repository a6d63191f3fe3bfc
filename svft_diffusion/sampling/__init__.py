"""Generating pictures: the sampler of the command line, the pictures' files, and labelled grids."""
