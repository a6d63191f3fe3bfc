"""The web app: a page over the same functions that the command line calls."""
