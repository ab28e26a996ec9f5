"""The config keys of the project, and reading configs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .data import register_coco_format

# Modules to import before a config is read, with commas between them.
PROJECTS_VARIABLE = "PLAINDET_PROJECTS"
# The functions of register_config, and those that add the keys of training methods.
_registered: list[Callable[[CfgNode], None]] = []
_of_methods: list[Callable[[CfgNode], None]] = []


def register_config(add_config: Callable[[CfgNode], None]) -> None:
    """Makes the config keys of a project of yours known: in training, for teachers, in the tools
    and in `plain_config.yaml`. Call it where the project registers its meta-architectures. The
    environment variable PLAINDET_PROJECTS names the modules that do, for commands which do not
    import them.

    Args:
        add_config: adds the keys to a Detectron2 config, which may have them already.
    """
    if add_config not in _registered:
        _registered.append(add_config)


def add_method_config(add_config: Callable[[CfgNode], None]) -> None:
    """Makes the config keys of a training method known, which are no keys of a plain detector."""
    _of_methods.append(add_config)


def add_method_configs(cfg: CfgNode) -> None:
    """Adds the keys of all training methods, and the one that chooses among them."""
    if "TRAINING_METHODS" not in cfg.MODEL:
        # The methods that train the detector, as ("LabelEnc", "CrossKD").
        cfg.MODEL.TRAINING_METHODS = ()
    for add_config in _of_methods:
        add_config(cfg)


def add_registered_configs(cfg: CfgNode) -> None:
    """Adds the keys of :func:`register_config`.

    Raises:
        ImportError: a module of PLAINDET_PROJECTS cannot be imported.
    """
    for module in filter(None, os.environ.get(PROJECTS_VARIABLE, "").split(",")):
        try:
            importlib.import_module(module.strip())
        except ImportError as error:
            raise ImportError(f"{PROJECTS_VARIABLE} names {module}: {error}") from error
    for add_config in _registered:
        add_config(cfg)


def read_config(
    config_file: str | os.PathLike,
    overrides: Sequence[str] = (),
    add_configs: Sequence[Callable[[CfgNode], None]] = (),
) -> CfgNode:
    """Reads a config with the keys of Detectron2, plaindet, :func:`register_config` and the
    training methods, and registers the data sets of its DATASETS.COCO_FORMAT.

    Args:
        config_file: yaml.
        overrides: KEY VALUE pairs.
        add_configs: functions that add further keys.

    Raises:
        ValueError: the file has a yaml tag that runs code, or is a LazyConfig.
    """
    cfg = merge_config(config_file, overrides, (add_method_configs, *add_configs))
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    return cfg


def merge_config(
    config_file: str | os.PathLike,
    overrides: Sequence[str] = (),
    add_configs: Sequence[Callable[[CfgNode], None]] = (),
) -> CfgNode:
    """Reads a config as :func:`read_config` does, without the keys of the training methods and
    without the data sets, which are not needed to build a detector."""
    cfg = get_cfg()
    for add_config in (add_plaindet_config, add_registered_configs, *add_configs):
        add_config(cfg)
    cfg = RelativePathsCfgNode(cfg)
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=_is_detectron2s(config_file))
    except (yaml.constructor.ConstructorError, KeyError) as error:
        if _is_lazy(config_file):
            raise ValueError(
                f"{config_file} is a LazyConfig, as runs of LazyConfigs write it, for Detectron2's "
                "tools/lazyconfig_train_net.py. Expected a yaml config with keys such as "
                "MODEL.META_ARCHITECTURE"
            ) from error
        if isinstance(error, KeyError):
            raise
        raise ValueError(
            f"{config_file} is refused, since it has a yaml tag that runs code, which only the "
            f"configs inside the detectron2 package may: write its value instead. {error}"
        ) from error
    cfg = CfgNode(cfg)
    cfg.merge_from_list(list(overrides))
    return cfg


def _is_detectron2s(config_file: str | os.PathLike) -> bool:
    """Some configs of Detectron2's own compute anchor sizes."""
    # Not by importing detectron2.model_zoo, which needs a setuptools with pkg_resources.
    package = os.path.realpath(os.path.dirname(detectron2.__file__))
    return os.path.realpath(config_file).startswith(os.path.join(package, "model_zoo", ""))


def _is_lazy(config_file: str | os.PathLike) -> bool:
    """Whether a yaml file has a `model` with a `_target_`."""
    with PathManager.open(str(config_file)) as file:
        root = yaml.compose(file)  # which makes nothing of its tags
    return any(
        key.value == "model" and any(name.value == "_target_" for name, _ in node.value)
        for key, node in root.value
        if isinstance(node, yaml.MappingNode)
    )


class RelativePathsCfgNode(CfgNode):
    """A config whose files may name the files of a teacher by their paths from their own folder.

    In a file, a relative MODEL.*.TEACHER.CONFIG_FILE or WEIGHTS is looked for in the folder of that
    file, as its `_BASE_` is, and then in the current one, as OUTPUT_DIR is.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        # The paths of the bases have been found already: this method reads them too.
        loaded = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        for node in loaded.get("MODEL", {}).values():
            teacher = node.get("TEACHER", {}) if isinstance(node, dict) else {}
            for key in ("CONFIG_FILE", "WEIGHTS"):
                if teacher.get(key):
                    path = os.path.join(os.path.dirname(filename), teacher[key])
                    teacher[key] = path if os.path.exists(path) else teacher[key]
        return loaded


def add_plaindet_config(cfg: CfgNode) -> None:
    """Adds the keys of plaindet to a Detectron2 config."""
    if "COCO_FORMAT" in cfg.DATASETS:
        return
    # Data sets in COCO format to register, each [name, json file, folder of images]. The names can
    # then be used in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_FORMAT = []
    # Whether the headers of all image files are read before a run, to compare their sizes with the
    # annotations'. Takes seconds for 100,000 images on a local disk.
    cfg.DATASETS.CHECK_IMAGES = True
    # With INPUT.CROP.ENABLED: if not empty, the crop is DETR's. It happens to every second image,
    # whose shorter side is resized to one of these lengths before.
    cfg.INPUT.CROP.RESIZE_BEFORE = ()

    # "SGD", which is Detectron2's, or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # For AdamW: factors of the learning rate, each [a part of parameters' names, factor]. The first
    # that fits counts.
    cfg.SOLVER.LR_FACTORS = []
    # For AdamW and a plain ViT: the factor of the learning rate from each block to the one below.
    # With another than 1 the position embedding has no weight decay, as in Detectron2's ViTDet.
    cfg.SOLVER.VIT_LR_DECAY_RATE = 1.0
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm of all gradients together.
    # With SOLVER.AMP.ENABLED: "float16" (Detectron2's), with scaled gradients, or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"

    # For build_fpn_backbone: the registered builder of the network below the FPN.
    cfg.MODEL.FPN.BOTTOM_UP = "build_resnet_backbone"
    # For build_fpn_backbone: the extra levels, "LastLevelMaxPool" (one, from p5), "LastLevelP6P7"
    # (two, convolutions) or "LastLevelP6P7WithoutReLU" (the same without the ReLU between them).
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelP6P7"
    # What the two convolutions read: "p5", or a feature of the network below ("res5").
    cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = "p5"

    # Any network of timm (build_timm_backbone; needs the optional extra [timm]).
    cfg.MODEL.TIMM = CfgNode()
    # The network, with the tag of its weights if there are several: "convnext_tiny.fb_in1k".
    cfg.MODEL.TIMM.NAME = ""
    # Whether timm downloads the weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    # A file or URL with the weights, in place of the download: timm's (.pth, .safetensors), or
    # torchvision's of ResNets, RegNets and MobileNetV2. MODEL.WEIGHTS, which is for whole
    # detectors, goes before both.
    cfg.MODEL.TIMM.CHECKPOINT_PATH = ""
    # "res<k>" has the stride 2^k. What lies behind the last one is not built.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Of networks with batch norms: "FrozenBN" (as they were trained), "BN" or "SyncBN".
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # k freezes all up to the features of stride 2^k, 2: the stem and a ResNet's first stage.
    cfg.MODEL.TIMM.FREEZE_AT = 0
    # Stochastic depth, of networks that have it.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0

    # Swin Transformer (build_swin_backbone). The defaults are Swin-T's.
    cfg.MODEL.SWIN = CfgNode()
    # Channels of the first stage; each following stage has twice as many.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks of each stage, and attention heads of each of its blocks.
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # The side of an attention window, in patches.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Stochastic depth: the rate of the last block. For more than 0 Detectron2 needs timm.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # "p0" to "p3" are the stages, of the strides 4 to 32.
    cfg.MODEL.SWIN.OUT_FEATURES = ["p1", "p2", "p3"]

    # ViTDet (build_vitdet_backbone; needs timm). The defaults are ViT-B's.
    cfg.MODEL.VIT = CfgNode()
    # The side of the squares to which batches are padded, so the largest side of an image.
    cfg.MODEL.VIT.IMAGE_SIZE = 1024
    cfg.MODEL.VIT.EMBED_DIM = 768
    # Blocks, and attention heads of each.
    cfg.MODEL.VIT.DEPTH = 12
    cfg.MODEL.VIT.NUM_HEADS = 12
    # The blocks, from 0, that attend to all patches. The others do so within windows, of this many
    # patches at a side.
    cfg.MODEL.VIT.GLOBAL_BLOCKS = [2, 5, 8, 11]
    cfg.MODEL.VIT.WINDOW_SIZE = 14
    # Stochastic depth: the rate of the last block.
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1

    # FCOS. The defaults are the original's with its later improvements.
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two subnets of the head, and their normalisation.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # Whether the last convolution of both subnets is deformable (modulated).
    cfg.MODEL.FCOS.DEFORMABLE_LAST_CONV = False
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Whether the centerness is predicted from the box subnet, and not the classification subnet.
    cfg.MODEL.FCOS.CENTERNESS_ON_BOX_SUBNET = True
    # Whether the box regression has a learnable factor for each level.
    cfg.MODEL.FCOS.LEVEL_SCALES = True
    # True: ReLU, and distances in units of the stride. False: exp, and distances in pixels.
    cfg.MODEL.FCOS.NORMALIZE_DISTANCES = True
    # Positions within this many strides of the box centre are positive; 0: everywhere in the box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # "iou" (-log IoU) or "giou" (1 - GIoU).
    cfg.MODEL.FCOS.BOX_REG_LOSS_TYPE = "giou"
    # Added to intersection and union in the IoU, in the units of the distances squared. 1.0 in the
    # original implementation.
    cfg.MODEL.FCOS.IOU_SMOOTHING = 1.0
    # Whether a position's centerness target is the weight of its box loss.
    cfg.MODEL.FCOS.CENTERNESS_WEIGHTED_BOX_LOSS = True
    # What the losses are divided by: "batch", the number of positives (or their weights) averaged
    # over processes, or "moving_average" of the number of positives of this process.
    cfg.MODEL.FCOS.LOSS_NORMALIZER = "batch"
    # Inference: candidates need a class probability above CLASS_SCORE_THRESH_TEST and a score
    # sqrt(class probability * centerness) above SCORE_THRESH_TEST.
    cfg.MODEL.FCOS.CLASS_SCORE_THRESH_TEST = 0.05
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # GFL and ATSS. The defaults are mmdet's.
    for name in ("GFL", "ATSS"):
        node = cfg.MODEL[name] = CfgNode()
        node.NUM_CLASSES = 80
        node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        # Convolutions in each of the two subnets of the head, and their normalisation.
        node.NUM_CONVS = 4
        node.NORM = "GN"
        # Class probability at the start of the training.
        node.PRIOR_PROB = 0.01
        # The side of the one square anchor at each position, in strides.
        node.ANCHOR_SCALE = 8.0
        # Anchors of each level that can become positives of an object (k in the ATSS paper).
        node.ASSIGNER_CANDIDATES = 9
        # Of the GIoU loss.
        node.BOX_LOSS_WEIGHT = 2.0
        # Inference: class probability that a candidate needs, and candidates of each level.
        node.SCORE_THRESH_TEST = 0.05
        node.TOPK_CANDIDATES_TEST = 1000
        node.NMS_THRESH_TEST = 0.6
    # The sides of a box are distributions over distances of 0..REG_MAX strides.
    cfg.MODEL.GFL.REG_MAX = 16
    # The exponent beta of the quality focal loss.
    cfg.MODEL.GFL.QUALITY_FOCAL_BETA = 2.0
    # Of the distribution focal loss.
    cfg.MODEL.GFL.DISTRIBUTION_LOSS_WEIGHT = 0.25
    # Factors of the deltas (dx, dy, dw, dh): 1 / mmdet's standard deviations.
    cfg.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Of the class loss.
    cfg.MODEL.ATSS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.ATSS.FOCAL_LOSS_GAMMA = 2.0

    # Deformable DETR (needs the optional extra [detr]). The defaults are the paper's.
    detr = cfg.MODEL.DEFORMABLE_DETR = CfgNode()
    detr.NUM_CLASSES = 80
    # Features of the backbone, the finest first. Further levels up to NUM_FEATURE_LEVELS come from
    # 3x3 convolutions of stride 2 behind the last one.
    detr.IN_FEATURES = ["res3", "res4", "res5"]
    detr.NUM_FEATURE_LEVELS = 4
    # The transformer: its width (a multiple of 32), attention heads, layers, width between the two
    # layers of a feed-forward network, and points that each head samples in each level.
    detr.HIDDEN_DIM = 256
    detr.NUM_HEADS = 8
    detr.NUM_ENCODER_LAYERS = 6
    detr.NUM_DECODER_LAYERS = 6
    detr.FEEDFORWARD_DIM = 1024
    detr.NUM_POINTS = 4
    detr.DROPOUT = 0.1
    # Object queries, the largest number of objects in an image.
    detr.NUM_QUERIES = 300
    # Whether each decoder layer refines the boxes of the one before.
    detr.BOX_REFINEMENT = False
    # Whether the queries are the encoder's best proposals. Needs BOX_REFINEMENT.
    detr.TWO_STAGE = False
    # Class probability at the start of the training.
    detr.PRIOR_PROB = 0.01
    # Weights of the focal loss of the classes, the L1 and the GIoU loss of the boxes, in the loss
    # and in the cost of the Hungarian matching.
    detr.CLS_WEIGHT = 2.0
    detr.L1_WEIGHT = 5.0
    detr.GIOU_WEIGHT = 2.0
