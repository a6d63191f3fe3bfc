"""Arithmetic on adapters that are loaded in one pipeline: blending, comparing, shrinking."""
