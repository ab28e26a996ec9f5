#!/usr/bin/env python3
"""Prints what this project and its tests need by setup.cfg, but PyTorch."""

import configparser
import re
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parent.parent / "setup.cfg")
extras = config["options.extras_require"]
needed = [config["options"]["install_requires"]]
needed += [extras[name] for name in ("test", "detr", "timm", "export")]
for line in "\n".join(needed).split("\n"):
    if re.match(r"(?!torch)\w", line):
        print(line)
