import golden
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from golden import assert_golden
from recipe import randn

from labelenc import LabelEncoder, LabelMap, build_label_encoder
from plaindet.modeling.fpn import LastLevelP6P7WithoutReLU

ENCODER = golden.load("encoder")
ENCODER_FPN = golden.load("encoder_fpn")
RES = ["res2", "res3", "res4", "res5"]


def label_maps(golden_file, tag, size):
    boxes, classes = golden.inputs(golden_file, f"{tag}_")
    return [LabelMap.from_boxes(b, c, size) for b, c in zip(boxes, classes)]


def official_encoder(num_classes):
    encoder = LabelEncoder(num_classes)
    golden.fill(encoder, "label_encoder.bottom_up.")
    return encoder


@pytest.mark.parametrize(
    ("tag", "num_classes", "size"), [("c5", 5, (96, 128)), ("c80", 80, (64, 96))]
)
def test_outputs_and_gradients_equal_official(tag, num_classes, size):
    encoder = official_encoder(num_classes)
    maps = label_maps(ENCODER, tag, size)
    assert_golden(torch.stack([m.to_dense(num_classes) for m in maps]), ENCODER, f"{tag}_in")

    assert_golden(encoder.stem(maps), ENCODER, f"{tag}_stage1")
    outputs = encoder(maps)
    for stage, name in enumerate(RES, start=2):
        assert_golden(outputs[name], ENCODER, f"{tag}_stage{stage}")
    loss = sum(output.square().mean() for output in outputs.values())
    assert loss.item() == pytest.approx(float(ENCODER[f"{tag}_loss"]), rel=1e-5)

    loss.backward()
    expected = dict(zip(ENCODER[f"{tag}_grad_names"], ENCODER[f"{tag}_grad_norms"]))
    prefix = "label_encoding_function.body."
    actual = {
        golden.official_name(f"label_encoder.bottom_up.{name}"): parameter.grad.norm().item()
        for name, parameter in encoder.named_parameters()
    }
    expected = {f"{prefix}{name.removeprefix(prefix)}": norm for name, norm in expected.items()}
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tag", ["c5", "c80"])
@pytest.mark.parametrize(("kind", "size"), [("rand", (40, 56)), ("odd", (37, 51))])
def test_dense_input_equals_official(tag, kind, size):
    num_classes = int(tag[1:])
    label_map = torch.from_numpy(randn(f"enc{kind}_{tag}", (1, num_classes, *size), 0.5))
    outputs = official_encoder(num_classes)(label_map)
    for stage, name in enumerate(RES, start=2):
        assert_golden(outputs[name], ENCODER, f"{tag}_{kind}_stage{stage}")


def detector_backbone(make_cfg, arch):
    cfg = make_cfg("PlainDet/Base-RetinaNet.yaml")
    if arch == "faster_rcnn":
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = [
            "res2",
            "res3",
            "res4",
            "res5",
        ]
        return build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3))
    fpn = build_backbone(cfg)
    if arch == "fcos":
        fpn.top_block = type(fpn.top_block)(256, 256, in_feature="p5")
    return fpn


@pytest.mark.parametrize("arch", ["retinanet", "fcos", "faster_rcnn"])
def test_fpn_equals_official(make_cfg, arch):
    detector_fpn = detector_backbone(make_cfg, arch)
    encoder = build_label_encoder(detector_fpn, num_classes=5)
    assert encoder.output_shape() == detector_fpn.output_shape()
    golden.fill(encoder, "label_encoder.")
    outputs = encoder(label_maps(ENCODER, "c5", (96, 128)))
    for level, output in enumerate(outputs.values()):
        assert_golden(output, ENCODER_FPN, f"{arch}_level{level}")
    loss = sum(output.square().mean() for output in outputs.values())
    assert loss.item() == pytest.approx(float(ENCODER_FPN[f"{arch}_loss"]), rel=1e-5)
    loss.backward()

    prefix = "label_encoding_function."
    actual = {
        golden.official_name(f"label_encoder.{name}"): parameter.grad.norm().item()
        for name, parameter in encoder.named_parameters()
    }
    names, norms = ENCODER_FPN[f"{arch}_param_names"], ENCODER_FPN[f"{arch}_grad_norms"]
    expected = {prefix + name.removeprefix(prefix): norm for name, norm in zip(names, norms)}
    assert actual == pytest.approx(expected, rel=1e-5)


def random_maps(classes_per_image, size=(33, 47)):
    return [
        LabelMap(torch.tensor(classes, dtype=torch.int64), torch.rand(len(classes), *size))
        for classes in classes_per_image
    ]


def test_sparse_stem_equals_dense():
    stem = LabelEncoder(80).double().stem
    # One class, several, none, all.
    maps = random_maps([[4], [0, 17, 79], [], list(range(80))])
    maps = [LabelMap(m.classes, m.values.double()) for m in maps]
    weights = torch.rand(4, 128, 17, 24, dtype=torch.float64)

    def output_and_gradients(x):
        stem.zero_grad()
        output = stem(x)
        (output * weights).sum().backward()
        return output, stem.weight.grad.clone(), stem.bias.grad.clone()

    sparse = output_and_gradients(maps)
    dense = output_and_gradients(torch.stack([m.to_dense(80) for m in maps]))
    for actual, expected in zip(sparse, dense):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)


def test_sparse_stem_equals_dense_in_float32():
    stem = LabelEncoder(80).stem
    maps = random_maps([[0, 17, 79]])
    with torch.no_grad():
        dense = stem(maps[0].to_dense(80)[None])
        torch.testing.assert_close(stem(maps), dense, rtol=1e-6, atol=1e-6)


def test_layers_of_table_8():
    encoder = LabelEncoder(80)
    convs = [
        (module.kernel_size[0], module.stride[0], module.out_channels)
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "shortcut" not in name
    ]
    table = [(7, 2, 128)]
    for channels, strides in ((64, [2]), (128, [2, 1]), (256, [2, 1]), (512, [2])):
        for stride in strides:
            table += [(1, 1, channels), (3, stride, channels), (1, 1, 4 * channels)]
    assert convs == table
    assert len(convs) == 19
    assert sum(p.numel() for p in encoder.parameters()) == 9_910_272


def test_initialisation():
    encoder = LabelEncoder(80)
    assert encoder.stem.weight.abs().max().item() == pytest.approx((80 * 49) ** -0.5, rel=1e-3)
    conv = encoder.res4[1].conv2
    assert conv.weight.abs().max().item() == pytest.approx((3 / (256 * 9)) ** 0.5, rel=1e-3)
    assert conv.bias.abs().max().item() == pytest.approx((256 * 9) ** -0.5, rel=5e-2)


def test_fpn_is_of_the_detectors_kind(make_cfg):
    cfg = make_cfg("quick/gfl_R_18_labelenc_step1.yaml", "MODEL.FPN.FUSE_TYPE", "avg")
    model = build_model(cfg)
    assert isinstance(model.label_encoder.top_block, LastLevelP6P7WithoutReLU)
    assert model.label_encoder._fuse_type == model.backbone._fuse_type == "avg"
