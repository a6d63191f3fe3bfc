"""Measuring what an adapter learned. On the embedded model the truth is known, and its own readers do the judging."""
