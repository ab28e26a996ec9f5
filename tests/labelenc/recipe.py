"""The weights of the golden numbers, made from the official parameter names.

A tensor is `z = RandomState(crc32(key)).standard_normal(shape)` in float32, scaled by its kind.
"""

import zlib

import numpy as np


def recipe_tensor(key, shape, seed=0):
    rs = np.random.RandomState((zlib.crc32(key.encode()) + seed) & 0xFFFFFFFF)
    z = rs.standard_normal(tuple(shape)).astype(np.float32)
    if key.endswith("running_mean"):
        return np.zeros(shape, np.float32)
    if key.endswith("running_var"):
        return np.ones(shape, np.float32)
    if len(shape) >= 2:
        gain = 1.4
        if any(s in key for s in ("cls_logits", "bbox_pred", "centerness", "cls_score")):
            gain = 0.3
        if "con3" in key:
            gain = 0.7
        if "offset" in key:
            gain = 0.3
        return (z * np.float32(gain / np.sqrt(int(np.prod(shape[1:]))))).astype(np.float32)
    if "scales" in key:
        return (1 + 0.1 * z).astype(np.float32)
    if key.split(".")[-1] == "bias":
        return (0.02 * z).astype(np.float32)
    base = 0.2 if ".bn3." in key else 1.0
    return (base + 0.1 * base * z).astype(np.float32)


def randn(name, shape, scale=1.0):
    rs = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    return rs.standard_normal(shape).astype(np.float32) * np.float32(scale)
