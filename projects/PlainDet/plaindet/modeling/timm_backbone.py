"""Any network of timm (PyTorch Image Models) as a backbone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from math import log2
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from .timm_weights import (
    check_images,
    create_without_data,
    read_weights,
    without_expected_warnings,
)

NORMS = ("FrozenBN", "BN", "SyncBN")


class TimmBackbone(Backbone):
    """The feature maps of one of timm's networks, without what lies behind the last of them.

    Its outputs have the names and strides of Detectron2's ResNet: "res2".."res5" of the strides
    4..32, in general "res<k>" of the stride 2^k. Their values are timm's own. The parameters have
    timm's names behind `model.`.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        *,
        pretrained: bool = False,
        checkpoint_path: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
    ):
        """
        Args:
            name: of the network, with or without the tag of its weights.
            out_features: names of the outputs. Of several features of one stride it is the last.
            pretrained: whether timm downloads its weights.
            checkpoint_path: a file with weights, see :func:`read_weights`; it goes before
                `pretrained`.
            norm: what becomes of batch norms, where the network has them: "FrozenBN" (statistics
                and affine parameters are constants), "BN" (trained) or "SyncBN".
            freeze_at: k > 0 freezes all that the features of stride 2^k come from; 2 is the stem
                and the first stage of a ResNet.
            drop_path_rate: stochastic depth, of networks that have it.
            in_channels: of the images; timm adapts weights for others than the 3 of RGB.

        Raises:
            ModuleNotFoundError: timm is not installed.
            ValueError: an unknown name, norm, feature or stage, a network that takes images of one
                size alone or whose features are not where their strides say, or a file that is not
                of this network.
            OSError: the weights cannot be downloaded, or the file does not exist.
        """
        super().__init__()
        _check_name(name)
        if norm not in NORMS:
            raise ValueError(f"MODEL.TIMM.NORM is {norm!r}, expected one of {list(NORMS)}")
        levels, options = _find_levels(name, drop_path_rate, in_channels)
        known = [f"res{k}" for k in levels]
        if not out_features or not set(out_features) <= set(known):
            raise ValueError(
                f"MODEL.TIMM.OUT_FEATURES is {list(out_features)}, expected some of {known}, which "
                f"{name} has"
            )
        if freeze_at != 0 and freeze_at not in levels:
            raise ValueError(
                f"MODEL.TIMM.FREEZE_AT is {freeze_at}, expected one of {[0, *levels]}: {name} has "
                f"no features of stride {2**freeze_at}"
            )
        chosen = {f"res{k}": level for k, level in levels.items() if f"res{k}" in out_features}
        self._out_features = list(chosen)
        self._out_feature_strides = {key: level.stride for key, level in chosen.items()}
        self._out_feature_channels = {key: level.channels for key, level in chosen.items()}
        self._channels_last = {key: level.channels_last for key, level in chosen.items()}

        options = {**options, "out_indices": [level.index for level in chosen.values()]}
        if checkpoint_path:
            weights = read_weights(name, checkpoint_path)
            self.model = _create(
                name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **options
            )
        elif pretrained:
            self.model = _download(name, options)
        else:
            self.model = _create(name, **options)
        _drop_unused(self.model, set().union(*(level.parameters for level in chosen.values())))
        self.model = _convert_norms(self.model, norm)
        if freeze_at:
            _freeze(self.model, levels[freeze_at].parameters)

    @property
    def size_divisibility(self) -> int:
        """The largest stride: features of images of other sizes would be rounded up or down,
        depending on the network."""
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, in_channels, H, W), H and W divisible by :attr:`size_divisibility`.

        Returns:
            of `out_features`: (N, channels, H / stride, W / stride)
        """
        if x.device.type == "cpu":
            # Training iterations of whole detectors take 0.84 to 1.00 times as long.
            x = x.contiguous(memory_format=torch.channels_last)
        outputs = dict(zip(self._out_features, self.model(x)))
        for name, channels_last in self._channels_last.items():
            if channels_last:
                outputs[name] = outputs[name].permute(0, 3, 1, 2)
        return outputs


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds a :class:`TimmBackbone` from MODEL.TIMM. Where it brings weights and the config has
    other images than these were trained with, a warning says so.

    Args:
        cfg: a config with the keys of plaindet.
        input_shape: of the images.
    """
    node = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        node.NAME,
        node.OUT_FEATURES,
        pretrained=node.PRETRAINED,
        checkpoint_path=node.CHECKPOINT_PATH,
        norm=node.NORM,
        freeze_at=node.FREEZE_AT,
        drop_path_rate=node.DROP_PATH_RATE,
        in_channels=input_shape.channels,
    )
    if node.PRETRAINED or node.CHECKPOINT_PATH:
        check_images(cfg, backbone.model.pretrained_cfg)
    return backbone


class Level(NamedTuple):
    """One of the features of a network."""

    index: int  # among timm's
    stride: int
    channels: int
    channels_last: bool  # (N, H, W, C)
    parameters: frozenset[str]  # the names of those that it comes from


def _check_name(name: str) -> None:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(
            f"MODEL.TIMM.NAME {name} needs timm, which is not installed: `pip install timm`"
        ) from error
    if ":" in name:  # of a hub or a folder
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know; similar: "
            f"{similar}"
        )
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, but of {architecture} timm {timm.__version__} knows the "
            f"weights {known}"
        )


def _create(name: str, **options) -> nn.Module:
    import timm

    with without_expected_warnings():
        return timm.create_model(name, features_only=True, **options)


def _download(name: str, options: dict) -> nn.Module:
    try:
        return _create(name, pretrained=True, **options)
    except Exception as error:  # of the network, the hub, the file
        raise OSError(
            f"MODEL.TIMM.PRETRAINED: timm cannot get the weights of {name} "
            f"({type(error).__name__}: {error}). Without a network give a file of them by "
            "MODEL.TIMM.CHECKPOINT_PATH, or train from random weights by MODEL.TIMM.PRETRAINED "
            "False"
        ) from error


@lru_cache
@torch.inference_mode(False)
@torch.enable_grad()  # the graph of the computation tells what a feature comes from
def _find_levels(
    name: str, drop_path_rate: float, in_channels: int
) -> tuple[dict[int, Level], dict]:
    """Tries a network on images without data.

    Returns:
        for each k the last features of stride 2^k; and the options with which the network takes
        images of any size
    """
    # Some networks drop paths by default, and some know no such option. Transformers want to be
    # told that images have several sizes; the second way is Swin's before timm 1.0.31.
    images = {"in_chans": in_channels}
    drop_path = {**images, "drop_path_rate": drop_path_rate}
    any_size = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
    reason = None
    for options in (drop_path, images) if drop_path_rate == 0 else (drop_path,):
        for more in any_size:
            try:
                model = create_without_data(name, features_only=True, **options, **more)
                return _levels_of(model.eval(), in_channels), {**options, **more}
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                if reason is None or not isinstance(error, TypeError):  # not of a wrong option
                    reason = error
    raise ValueError(
        f"MODEL.TIMM.NAME {name} cannot be a backbone for images of several sizes: {reason}"
    ) from reason


def _levels_of(model: nn.Module, in_channels: int) -> dict[int, Level]:
    info = model.feature_info
    strides, channels = info.reduction(), info.channels()
    if any(stride & (stride - 1) for stride in strides):
        raise ValueError(f"its features have the strides {strides}, expected powers of two")
    levels = {}
    for sides in ((3, 4), (2, 5)):
        height, width = (max(strides) * side for side in sides)
        features = model(torch.zeros(1, in_channels, height, width, device="meta"))
        for index, (feature, stride, num_channels) in enumerate(zip(features, strides, channels)):
            expected = (height // stride, width // stride)
            channels_last = tuple(feature.shape) == (1, *expected, num_channels)
            if not channels_last and tuple(feature.shape) != (1, num_channels, *expected):
                raise ValueError(
                    f"its features of stride {stride} are {tuple(feature.shape)} for images of "
                    f"{height} x {width}, expected {expected}"
                )
            names = _reached(model, feature)
            levels[int(log2(stride))] = Level(index, stride, num_channels, channels_last, names)
    return levels


def _reached(model: nn.Module, feature: torch.Tensor) -> frozenset[str]:
    """The names of the parameters that a feature comes from, by the graph of its computation."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    nodes, seen, names = [feature.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            names.add(name_of[node.variable])
        nodes += [following for following, _ in node.next_functions]
    return frozenset(names)


def _drop_unused(model: nn.Module, used: set[str]) -> None:
    """Removes what lies behind the last feature, which EfficientNets keep and go on to compute.
    DistributedDataParallel refuses parameters that get no gradient."""
    for prefix, module in list(model.named_modules()):
        while isinstance(module, nn.Sequential) and len(module) > 0:
            last = f"{prefix}.{list(module._modules)[-1]}"
            names = {f"{last}.{name}" for name, _ in module[-1].named_parameters()}
            if not names or names & used:
                break
            del module[-1]
    for name, parameter in model.named_parameters():
        if name not in used:
            parameter.requires_grad_(False)


def _convert_norms(model: nn.Module, norm: str) -> nn.Module:
    # timm's own: Detectron2's and PyTorch's conversions drop the activations that are inside of
    # timm's batch norms, without a word.
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "FrozenBN":
        return freeze_batch_norm_2d(model)
    return convert_sync_batchnorm(model) if norm == "SyncBN" else model


def _freeze(model: nn.Module, names: frozenset[str]) -> None:
    for prefix, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            is_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
            if is_norm and f"{prefix}.{name}.weight".lstrip(".") in names:
                module.add_module(name, _convert_norms(child, "FrozenBN"))
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
