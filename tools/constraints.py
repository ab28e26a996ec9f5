#!/usr/bin/env python3
"""Prints the lines of constraints.txt that are for a Python version, such as 3.13. pip itself reads
them for the Python that it runs with, also where it downloads for another."""

import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # which is there wherever pip is

for line in (Path(__file__).resolve().parent.parent / "constraints.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        constraint = Requirement(line)
        if not constraint.marker or constraint.marker.evaluate({"python_version": sys.argv[1]}):
            print(f"{constraint.name}{constraint.specifier}")
