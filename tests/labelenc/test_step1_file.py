import zipfile

import pytest
import torch
from detectron2.modeling import build_model

from labelenc import inherit_step1_file, save_step1_file

STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"
STEP2 = "quick/retinanet_R_18_labelenc_step2.yaml"


@pytest.fixture
def step1_file(make_cfg, tmp_path):
    path = str(tmp_path / "label_encoder.pth")
    save_step1_file(build_model(make_cfg(STEP1)), path)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("MODEL.RETINANET.NUM_CLASSES", "80"),
            "num_classes is 3 in the file and 80 in the config",
        ),
        (
            ("MODEL.FPN.OUT_CHANNELS", "32"),
            r"fpn is {'p3': \[64, 8\].* in the file and {'p3': \[32, 8\].* in the config",
        ),
        (
            ("MODEL.RETINANET.NUM_CONVS", "3"),
            r"another head: only in the config \['head.bbox_subnet.6.bias'.* in the file \[\]",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0]]"),
            r"another head: head.cls_score.weight is \(27, 64, 3, 3\) .* and \(18, 64, 3, 3\) in",
        ),
        (
            ("MODEL.FPN.NORM", ""),
            r"another label encoder: only in the config \['fpn_lateral3.bias'.*, only in the file "
            r"\['fpn_lateral3.norm.bias'",
        ),
    ],
)
def test_refuses_a_file_that_does_not_fit(make_cfg, step1_file, overrides, message):
    model = build_model(make_cfg(STEP2, *overrides))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        inherit_step1_file(model, step1_file)
    assert step1_file in str(error.value)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))


@pytest.mark.parametrize(
    ("detector", "overrides", "message"),
    [
        (
            "retinanet",
            ("MODEL.RETINANET.BBOX_REG_WEIGHTS", "(10.0, 10.0, 5.0, 5.0)"),
            r"'box_weights': \[1.0, .* in the file and {'box_weights': \[10.0, 10.0,",
        ),
        (
            "retinanet",
            ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
            "'anchor_offset': 0.0.*file.* 0.5",
        ),
        (
            "fcos_imprv",
            ("MODEL.FCOS.NORMALIZE_DISTANCES", "False"),
            "'normalize_distances': True.* file and .*'normalize_distances': False",
        ),
        (
            "atss",
            ("MODEL.ATSS.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0)"),
            r"'box_weights': \[10.0, .* in the file and {'box_weights': \[1.0,",
        ),
        ("faster_rcnn", ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"), "0.0} in the file and .* 0.5"),
    ],
)
def test_refuses_a_head_with_another_meaning(make_cfg, tmp_path, detector, overrides, message):
    """Weights of the same shapes, which another config would read in another way."""
    path = str(tmp_path / "label_encoder.pth")
    save_step1_file(build_model(make_cfg(f"quick/{detector}_R_18_labelenc_step1.yaml")), path)
    model = build_model(make_cfg(f"quick/{detector}_R_18_labelenc_step2.yaml", *overrides))
    with pytest.raises(ValueError, match=f"does not fit: settings is .*{message}"):
        inherit_step1_file(model, path)


def test_encoder_alone_fits_another_head(make_cfg, step1_file):
    model = build_model(make_cfg(STEP2, "MODEL.RETINANET.NUM_CONVS", "3"))
    inherit_step1_file(model, step1_file, with_detector=False)
    saved = torch.load(step1_file, weights_only=True)["label_encoder"]
    assert all(torch.equal(v, saved[k]) for k, v in model.label_encoder.state_dict().items())


def test_keeps_the_statistics_of_a_pretrained_backbone(make_cfg, step1_file):
    """Inheriting head and FPN leaves a frozen batch norm as it was loaded from ImageNet weights."""
    model = build_model(make_cfg(STEP2, "MODEL.RESNETS.NORM", "FrozenBN"))
    norm = model.backbone.bottom_up.stem.conv1.norm
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(7.0)
    inherit_step1_file(model, step1_file)
    assert (norm.running_mean == 0.3).all()
    assert (norm.running_var == 7.0).all()


def edited(path, **changes):
    data = torch.load(path, weights_only=True)
    for key, value in changes.items():
        data[key] = value
    torch.save({key: value for key, value in data.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "has version 7, expected version 2"),
        (
            {"description": {"detector": "FCOS", "num_classes": 3, "fpn": {}}},
            "detector is FCOS in the file and RetinaNet in the config; fpn is {} in the file",
        ),
        (
            {"label_encoder": None},
            r"no step-1 file: found \['description', 'head', 'version'\], expected "
            r"\['description', 'head', 'label_encoder', 'version'\]",
        ),
    ],
)
def test_refuses_an_edited_file(make_cfg, step1_file, changes, message):
    edited(step1_file, **changes)
    with pytest.raises(ValueError, match=message):
        inherit_step1_file(build_model(make_cfg(STEP2)), step1_file)


def test_refuses_other_files(make_cfg, tmp_path):
    model = build_model(make_cfg(STEP2))
    with pytest.raises(ValueError, match="MODEL.LABELENC.STEP1_FILE is empty"):
        inherit_step1_file(model, "")
    with pytest.raises(FileNotFoundError, match="STEP1_FILE: .*nothing.pth does not exist"):
        inherit_step1_file(model, str(tmp_path / "nothing.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pth is no step-1 file"):
        inherit_step1_file(model, str(tmp_path / "text.pth"))
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("packed/data.pkl", b"")
    with pytest.raises(ValueError, match=r"packed.pth is no step-1 file: .* is compressed"):
        inherit_step1_file(model, str(tmp_path / "packed.pth"))
    # A checkpoint of the run is easily taken for the step-1 file.
    torch.save({"model": model.state_dict(), "iteration": 1}, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"found \['iteration', 'model'\]"):
        inherit_step1_file(model, str(tmp_path / "model_final.pth"))


def test_does_not_run_code_of_the_file(make_cfg, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"label_encoder": Payload()}, tmp_path / "label_encoder.pth")
    with pytest.raises(ValueError, match="is no step-1 file"):
        inherit_step1_file(build_model(make_cfg(STEP2)), str(tmp_path / "label_encoder.pth"))
    assert not (tmp_path / "executed").exists()
