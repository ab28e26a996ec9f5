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
            r"anchor_aspect_ratios is \[\[0.5, 1.0, 2.0\], .* and \[\[0.5, 1.0\], ",
        ),
        (("MODEL.FPN.FUSE_TYPE", "avg"), "fuse_type is sum in the file and avg in the config"),
        (
            (
                *("MODEL.BACKBONE.NAME", "build_fpn_backbone"),
                *("MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5"),
            ),
            "extra_levels is LastLevelP6P7 on res5 in the file and LastLevelP6P7 on p5 in the",
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
            r"box_weights is \[1.0, .* in the file and \[10.0, 10.0,",
        ),
        (
            "retinanet",
            ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
            "anchor_offset is 0.0 in the file and 0.5",
        ),
        (
            "retinanet",
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 24, 28]]"),
            r"anchor_sizes is \[\[12.0, 15.1, 19.0\], .* and \[\[16.0, 24.0, 28.0\], ",
        ),
        (
            "retinanet",
            ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0, 0.5, 2.0]]"),
            r"anchor_aspect_ratios is \[\[0.5, 1.0, 2.0\], .* and \[\[1.0, 0.5, 2.0\], ",
        ),
        (
            "fcos_imprv",
            ("MODEL.FCOS.NORMALIZE_DISTANCES", "False"),
            "normalize_distances is True in the file and False in the config",
        ),
        (
            "atss",
            ("MODEL.ATSS.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0)"),
            r"box_weights is \[10.0, .* in the file and \[1.0,",
        ),
        (
            "atss",
            ("MODEL.ATSS.ANCHOR_SCALE", "4.0"),
            r"anchor_sizes is \[\[24.0\], .* and \[\[32.0\], ",
        ),
        ("faster_rcnn", ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"), "anchor_offset is 0.0 in the"),
        (
            "faster_rcnn",
            ("MODEL.RPN.BBOX_REG_WEIGHTS", "(2.0, 2.0, 1.0, 1.0)"),
            r"proposal_box_weights is \[1.0, .* in the file and \[2.0, ",
        ),
        (
            "faster_rcnn",
            ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0)"),
            r"box_weights is \[\[10.0, .* in the file and \[\[1.0, ",
        ),
        (
            "mask_rcnn",
            ("MODEL.LABELENC.LABEL_MAP", "boxes"),
            "label_map is masks in the file and boxes in the config",
        ),
    ],
)
def test_refuses_a_head_with_another_meaning(make_cfg, tmp_path, detector, overrides, message):
    """Weights of the same shapes, which another config would read in another way."""
    path = str(tmp_path / "label_encoder.pth")
    save_step1_file(build_model(make_cfg(f"quick/{detector}_R_18_labelenc_step1.yaml")), path)
    model = build_model(make_cfg(f"quick/{detector}_R_18_labelenc_step2.yaml", *overrides))
    with pytest.raises(ValueError, match=f"does not fit: {message}"):
        inherit_step1_file(model, path)


def test_refuses_a_head_of_other_shapes(make_cfg, tmp_path):
    path = str(tmp_path / "label_encoder.pth")
    save_step1_file(build_model(make_cfg("quick/gfl_R_18_labelenc_step1.yaml")), path)
    cfg = make_cfg("quick/gfl_R_18_labelenc_step2.yaml", "MODEL.GFL.REG_MAX", "8")
    message = r"another head: head.bbox_pred.weight is \(68, 64, 3, 3\) .* and \(36, 64, 3, 3\) in"
    with pytest.raises(ValueError, match=message):
        inherit_step1_file(build_model(cfg), path)


def test_encoder_alone_fits_another_head(make_cfg, step1_file):
    other = ("MODEL.RETINANET.NUM_CONVS", "3", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 24, 28]]")
    model = build_model(make_cfg(STEP2, *other))
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


def test_refuses_what_is_no_tensor(make_cfg, step1_file):
    head = torch.load(step1_file, weights_only=True)["head"]
    edited(step1_file, head={**head, "head.cls_score.bias": 3})
    with pytest.raises(ValueError, match=r"another head: head.cls_score.bias is int in .* \(27,\)"):
        inherit_step1_file(build_model(make_cfg(STEP2)), step1_file)


def edited(path, **changes):
    data = torch.load(path, weights_only=True)
    for key, value in changes.items():
        data[key] = value
    torch.save({key: value for key, value in data.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "has version 7, expected version 3"),
        (
            {"description": {"detector": "FCOS", "num_classes": 3, "fpn": {}}},
            "detector is FCOS in the file and RetinaNet in the config; fpn is {} in the file",
        ),
        ({"description": "RetinaNet"}, "has a str as its 'description', expected a dict"),
        ({"head": []}, "has a list as its 'head', expected a dict"),
        (
            {"label_encoder": None},
            "no step-1 file: found version, description, head, expected "
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
    with pytest.raises(ValueError, match="found model, iteration, expected"):
        inherit_step1_file(model, str(tmp_path / "model_final.pth"))


def test_does_not_run_code_of_the_file(make_cfg, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"label_encoder": Payload()}, tmp_path / "label_encoder.pth")
    with pytest.raises(ValueError, match="is no step-1 file"):
        inherit_step1_file(build_model(make_cfg(STEP2)), str(tmp_path / "label_encoder.pth"))
    assert not (tmp_path / "executed").exists()


def test_fast_rcnn(make_cfg, tmp_path):
    """Its proposals are part of the data: there is no generator whose settings matter."""
    overrides = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    cfg = make_cfg("quick/faster_rcnn_R_18_labelenc_step1.yaml", *overrides)
    save_step1_file(build_model(cfg), str(tmp_path / "file"))
    cfg = make_cfg("quick/faster_rcnn_R_18_labelenc_step2.yaml", *overrides)
    inherit_step1_file(build_model(cfg), str(tmp_path / "file"))
