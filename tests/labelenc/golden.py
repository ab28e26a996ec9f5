"""Access to the numbers of the official implementation in tests/data/labelenc."""

import re
from pathlib import Path

import numpy as np
import torch
from recipe import recipe_tensor

FOLDER = Path(__file__).parent.parent / "data" / "labelenc"


def load(name):
    return np.load(FOLDER / f"{name}.npz")


def assert_golden(actual, golden, key, rtol=1e-5):
    """Compares with a stored array: whole, or its shape, norm and samples. The tolerance is
    relative to the largest value."""
    actual = actual.detach().numpy()
    if key in golden:
        expected = golden[key]
        assert actual.shape == expected.shape, key
    else:
        assert actual.shape == tuple(golden[f"{key}__shape"]), key
        np.testing.assert_allclose(
            np.linalg.norm(actual.astype(np.float64)), golden[f"{key}__l2"], rtol=rtol, err_msg=key
        )
        actual, expected = actual.flatten()[golden[f"{key}__idx"]], golden[f"{key}__val"]
    np.testing.assert_allclose(
        actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=key
    )


def official_name(key):
    """The official name of a parameter of a dense LabelEnc detector."""
    for pattern, replacement in (
        (r"^(detector|training_only\.LabelEnc)\.", ""),
        (r"^label_encoder\.", "label_encoding_function."),
        (r"^feature_adapter", "feature_adapt"),
        (r"label_encoding_function\.bottom_up\.stem", "label_encoding_function.body.stage1"),
        # A stage of one block has no block number there.
        (
            r"label_encoding_function\.bottom_up\.res([25])\.0\.",
            r"label_encoding_function.body.stage\1.",
        ),
        (r"label_encoding_function\.bottom_up\.res", "label_encoding_function.body.stage"),
        (r"(label_encoding_function\S*\.)conv(\d)", r"\1con\2"),
        (r"(label_encoding_function\S*\.)shortcut", r"\1downsample.0"),
        (r"^backbone\.bottom_up\.", "backbone.body."),
        (r"conv(\d)\.norm", r"bn\1"),
        (r"shortcut\.norm", "downsample.1"),
        (r"shortcut\.weight", "downsample.0.weight"),
        (r"top_block", "fpn.top_blocks"),
        (r"^head\.cls_subnet", "rpn.head.cls_tower"),
        (r"^head\.bbox_subnet", "rpn.head.bbox_tower"),
        (r"^head\.cls_score", "rpn.head.cls_logits"),
        (r"^head\.bbox_pred", "rpn.head.bbox_pred"),
        (r"^head\.ctrness", "rpn.head.centerness"),
        (r"^head\.scales\.(\d)", r"rpn.head.scales.\1.scale"),
    ):
        key = re.sub(pattern, replacement, key)
    key = re.sub(r"backbone\.body\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}", key)
    return re.sub(
        r"fpn_(lateral|output)(\d)",
        lambda m: f"fpn.fpn_{'inner' if m[1] == 'lateral' else 'layer'}{int(m[2]) - 1}",
        key,
    )


@torch.no_grad()
def fill(module, prefix=""):
    """Gives every parameter and buffer the values that the recipe makes from its official name."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.removeprefix("detector.").startswith(("pixel_", "anchor_generator")):
            for key, part in official_tensors(prefix + name, tensor):
                values = recipe_tensor(key, tuple(part.shape))
                part.copy_(torch.from_numpy(values))


def official_tensors(name, tensor):
    """The official names of a parameter and what belongs to them; there, the factor of each level
    is a parameter of its own."""
    name = name.removeprefix("detector.")
    if name == "head.scales":
        return [(official_name(f"{name}.{i}"), tensor[i : i + 1]) for i in range(len(tensor))]
    return [(official_name(name), tensor)]


def inputs(golden, tag):
    """Boxes in Detectron2's coordinates and classes of a stored case."""
    boxes = torch.from_numpy(golden[f"{tag}boxes"]) + 0.5
    return boxes, torch.from_numpy(golden[f"{tag}labels0"])
