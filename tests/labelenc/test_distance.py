import golden
import numpy as np
import pytest
import torch
from golden import assert_golden
from recipe import randn

from labelenc import FeatureAdapter, feature_distance

GOLDEN = golden.load("distance_loss")
SIZES = [tuple(size) for size in GOLDEN["sizes"].tolist()]


def official_inputs():
    features = [
        torch.from_numpy(randn(f"dist_feat{i}", (2, 256, *size), 1.5)).requires_grad_()
        for i, size in enumerate(SIZES)
    ]
    encodings = [
        (torch.from_numpy(randn(f"dist_enc{i}", (2, 256, *size), 0.7)) + 0.3).requires_grad_()
        for i, size in enumerate(SIZES)
    ]
    return features, encodings


def test_equals_official():
    features, encodings = official_inputs()
    adapter = FeatureAdapter(256)
    golden.fill(adapter, "feature_adapt.")
    loss = feature_distance([adapter(feature) for feature in features], encodings)
    assert loss.item() == pytest.approx(float(GOLDEN["step1_loss"]), rel=1e-6)

    loss.backward()
    assert all(encoding.grad is None for encoding in encodings)
    for i, feature in enumerate(features):
        assert_golden(feature.grad, GOLDEN, f"grad_feat{i}")
    for name, parameter in adapter.named_parameters():
        assert_golden(parameter.grad, GOLDEN, f"grad_adapt.{name}")


def test_closed_form():
    """Two positions with values (a, b) normalise to (1, -1) or (-1, 1)."""
    up = torch.tensor([1.0, 5.0]).view(1, 1, 1, 2) * 1000
    down = up.flip(3)
    assert feature_distance([up], [up]).item() == 0
    assert feature_distance([up], [down]).item() == pytest.approx(4)
    # A level counts by its size: 2 of 4 + 2 elements are at distance 4, 4 at distance 0.
    longer = torch.cat([up, up], dim=2)
    assert feature_distance([up, longer], [down, longer]).item() == pytest.approx(4 / 3)


def test_constant_level_is_finite():
    feature = torch.ones(1, 8, 1, 1, requires_grad=True)
    loss = feature_distance([feature], [torch.randn(1, 8, 1, 1)])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_mixed_precision(dtype):
    features = [torch.randn(1, 8, 16, 16).to(dtype) * 30]
    encodings = [torch.randn(1, 8, 16, 16).to(dtype) * 30]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_distance(features, encodings)
    assert loss.dtype == torch.float32
    expected = feature_distance([f.double() for f in features], [e.double() for e in encodings])
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-5)
