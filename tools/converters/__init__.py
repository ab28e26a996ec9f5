"""Converters of weights that others trained, for the tools `convert_*`."""
