"""Files with weights from elsewhere do not run code, and are refused with a message."""

import os
import pickle
import zipfile
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from torch import nn

from plaindet import read_config
from plaindet.loading import SafeCheckpointer

CONFIGS = Path(__file__).parent.parent.parent / "configs"


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def content(path):
    return {"model": {"weight": np.full((2, 3), 2.0), "bias": np.ones(2)}, "note": Attack(path)}


def pickled(path, attack):
    path = path.with_suffix(".pkl")
    path.write_bytes(pickle.dumps({**content(attack), "__author__": "x"}))
    return path


def saved(path, attack):
    torch.save(content(attack), path)
    return path


def saved_as_pyth(path, attack):
    return saved(path.with_suffix(".pyth"), attack)


def saved_by_pytorch_1(path, attack):
    torch.save(content(attack), path, _use_new_zipfile_serialization=False)
    return path


def cut_off(path, attack):
    torch.save({"model": nn.Linear(3, 2).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def compressed(path, attack):
    """As a small file that fills the memory."""
    torch.save({"model": {"weight": torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)
    return path


def text(path, attack):
    path.write_text("<html>404</html>")
    return path


def text_that_unpickles_in_part(path, attack):
    path.write_text("Repository unavailable")
    return path


def text_as_pickle(path, attack):
    return text(path.with_suffix(".pkl"), attack)


@pytest.mark.parametrize(
    "make",
    [
        pickled,
        saved,
        saved_as_pyth,
        saved_by_pytorch_1,
        cut_off,
        compressed,
        text,
        text_that_unpickles_in_part,
        text_as_pickle,
    ],
)
def test_refused(tmp_path, make):
    path = make(tmp_path / "weights.pth", str(tmp_path / "attacked"))
    with pytest.raises(ValueError, match=f"{path} is refused"):
        SafeCheckpointer(nn.Linear(3, 2)).load(str(path))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_model_zoo_pickles(tmp_path, protocol):
    """As Detectron2 publishes them."""
    arrays = {"weight": np.random.rand(2, 3).astype(np.float32), "bias": np.ones(2, np.float32)}
    path = tmp_path / "model.pkl"
    data = {"model": arrays, "__author__": "Detectron2 Model Zoo", "score": np.float64(1)}
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    for model, checkpointer in zip(models, (SafeCheckpointer, DetectionCheckpointer)):
        checkpointer(model).load(str(path))
    assert torch.equal(models[0].weight, torch.from_numpy(arrays["weight"]))
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_resnets(tmp_path, depth):
    """Their file is read as it is, and the features are torchvision's."""
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    cfg = read_config(CONFIGS / f"PlainDet/backbones/torchvision_R_{depth}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model = build_backbone(cfg).eval()
    SafeCheckpointer(model).load(str(tmp_path / "resnet.pth"))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.bottom_up(x)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage in range(1, 5):
            x = getattr(theirs, f"layer{stage}")(x)
            scale = x.std().item()
            torch.testing.assert_close(features[f"res{stage + 1}"], x, rtol=1e-4, atol=1e-4 * scale)


def test_configs_run_no_code(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path / 'attacked'}']\n")
    with pytest.raises(ValueError, match=f"{config} is refused, since it has a yaml tag"):
        read_config(config)
    assert not (tmp_path / "attacked").exists()
    # Detectron2's own compute anchor sizes.
    # (Without detectron2.model_zoo, which needs pkg_resources.)
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    config = folder / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml"
    assert read_config(config).MODEL.META_ARCHITECTURE == "RetinaNet"
