"""Alignment and losses against the official implementation's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crosskd import (
    align_features,
    box_loss,
    distribution_loss,
    feature_loss,
    quality_focal_loss,
)
from crosskd.losses import probability_logits

NUMBERS = np.load(Path(__file__).parent.parent / "data" / "crosskd" / "components.npz")


def get(key):
    return torch.from_numpy(np.asarray(NUMBERS[key]))


def close(actual, key, atol=1e-6):
    torch.testing.assert_close(actual, get(key), rtol=1e-5, atol=atol)


def test_quality_focal_loss():
    logits = get("qfl/pred").requires_grad_()
    target = get("qfl/target_logits")
    loss = quality_focal_loss(logits, target)
    close(loss, "qfl/beta1_none")
    close(quality_focal_loss(logits, target, gamma=2.0), "qfl/beta2_none")
    ((loss.sum(dim=1) * get("qfl/weight")).sum() / get("qfl/avg_factor")).backward()
    close(logits.grad, "qfl/beta1_weighted_avg_grad")


def test_probability_logits():
    logits = (torch.randn(5, 4) * 3).requires_grad_()
    probabilities = probability_logits(logits).sigmoid()
    torch.testing.assert_close(probabilities, logits.softmax(dim=-1), rtol=1e-4, atol=1e-6)
    certain = torch.tensor([[80.0, 0.0, -90.0]], requires_grad=True)
    probability_logits(certain).sum().backward()
    assert certain.grad.isfinite().all()


def test_binary_cross_entropy():
    """gamma 0: H(p', p), which is smallest but not 0 where both agree."""
    logits = torch.tensor([0.3, -1.0])
    p = logits.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(quality_focal_loss(logits, logits, gamma=0.0), entropy)


def test_distribution_loss():
    logits = get("kl/pred").requires_grad_()
    target = get("kl/soft_label")
    loss = distribution_loss(logits, target)
    close(loss, "kl/T1_sum_none")
    close(distribution_loss(logits, target, temperature=10.0), "kl/T10_sum_none", atol=1e-5)
    ((loss * get("kl/weight")).sum() / get("kl/avg_factor")).backward()
    close(logits.grad, "kl/T1_sum_weighted_avg_grad")


@pytest.mark.parametrize("loss_type", ["giou", "iou"])
def test_box_loss(loss_type):
    """Also of boxes that are far apart, without area or inverted."""
    boxes, target = get("box/pred").requires_grad_(), get("box/target")
    loss = box_loss(boxes, target, loss_type)
    close(loss, f"box/{loss_type}_none")
    ((loss * get("box/weight")).sum() / get("box/avg_factor")).backward()
    close(boxes.grad, f"box/{loss_type}_weighted_avg_grad")


def test_l1_box_loss():
    boxes = torch.tensor([[0.0, 1, 2, 3]])
    assert box_loss(boxes, boxes + torch.tensor([1.0, -2, 0, 0.5]), "l1").item() == 3.5


def test_feature_loss():
    features = get("pkd/pred").requires_grad_()
    target = get("pkd/target")
    loss = feature_loss(features, target)
    close(loss, "pkd/lw1_mean")
    loss.backward()
    close(features.grad[:, :4], "pkd/lw1_grad")


def test_align_features():
    features, reference = get("align/stu").requires_grad_(), get("align/tea")
    aligned = align_features(features, reference)
    close(aligned, "align/out", atol=1e-5)
    (aligned * get("align/cotangent")).sum().backward()
    close(features.grad, "align/grad_stu", atol=1e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 1.0), (5.0, 0.02)])
@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (40, 3)])
def test_align_features_in_float64(shape, mean, deviation):
    """(x - mean(x)) / (std(x) + 1e-6) * std(y) + mean(y), and its gradient in x and y."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) * deviation + mean, torch.randn(shape) * 3 - 2]
    cotangent, dims = torch.randn(shape), [0, 2, 3][: len(shape) - 1]

    def exact(x, y):
        (std_x, mean_x), (std_y, mean_y) = (
            torch.std_mean(z, dim=dims, keepdim=True) for z in (x, y)
        )
        return (x - mean_x) / (std_x + 1e-6) * std_y + mean_y

    outputs = []
    for function, dtype in ((align_features, torch.float32), (exact, torch.float64)):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = function(*tensors)
        gradients = torch.autograd.grad(output, tensors, cotangent.to(dtype))
        outputs.append([tensor.double() for tensor in (output, *gradients)])
    for actual, expected in zip(*outputs):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_align_constant_channels():
    """A channel of one value becomes the reference's mean, with a finite gradient."""
    features = get("align/const_stu").requires_grad_()
    aligned = align_features(features, get("align/const_tea"))
    close(aligned, "align/const_out", atol=1e-5)
    aligned.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_align_a_single_position():
    """One image with a level of 1 x 1: the official implementation makes NaN of it."""
    features, reference = torch.randn(1, 4, 1, 1, requires_grad=True), torch.randn(1, 4, 1, 1)
    aligned = align_features(features, reference)
    torch.testing.assert_close(aligned, reference)
    aligned.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_align_nothing():
    """As the features of the regions of a batch without any."""
    features = torch.randn(0, 4, 7, 7, requires_grad=True)
    aligned = align_features(features, torch.randn(0, 4, 7, 7))
    assert aligned.shape == (0, 4, 7, 7)
    aligned.sum().backward()


def test_half_precision_inputs():
    half = torch.randn(2, 3, 4, 5).half()
    for loss in (
        quality_focal_loss(half, half.flip(0)),
        distribution_loss(half, half.flip(0)),
        box_loss(half[..., :4], half[..., :4].flip(0), "giou"),
        feature_loss(half, half.flip(0)),
        align_features(half, half.flip(0)),
    ):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss).all()
