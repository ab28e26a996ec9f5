"""Converters of weights that others trained, which the tools of the same names use."""
