"""The backbones of mmdet's checkpoints: what they are, their names here, and their config."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from plaindet.messages import some_of

from .key_layout import Layout, layer_keys, shape_of

BOTTOM_UP = "backbone.bottom_up"
# Whether the blocks are bottlenecks, and the number of blocks of each stage.
DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
}


class ResNet(NamedTuple):
    bottlenecks: bool  # or basic blocks
    blocks: tuple[int, ...]  # of each stage
    stem_channels: int
    width: int  # channels of the first convolution of the first stage

    last_output = "res5"

    @property
    def depth(self) -> int:
        return DEPTHS[self.bottlenecks, self.blocks]

    @property
    def name(self) -> str:
        return f"ResNet-{self.depth}"

    def stage_channels(self, stage: int) -> int:
        """Output channels of the stages 0 to 3."""
        return self.width * 2**stage * (4 if self.bottlenecks else 1)

    def config(self) -> dict:
        """The keys of MODEL."""
        return {
            "RESNETS": {
                "DEPTH": self.depth,
                "STEM_OUT_CHANNELS": self.stem_channels,
                "RES2_OUT_CHANNELS": self.stage_channels(0),
                "WIDTH_PER_GROUP": self.width,
            }
        }

    def layout(self) -> Layout:
        in_channels = self.stem_channels
        names = "backbone.conv1", "backbone.bn1", f"{BOTTOM_UP}.stem.conv1"
        layout = _conv_with_norm(*names, in_channels, 3, 7, 7)
        for stage, num_blocks in enumerate(self.blocks):
            width, out_channels = self.width * 2**stage, self.stage_channels(stage)
            for block in range(num_blocks):
                theirs = f"backbone.layer{stage + 1}.{block}"
                ours = f"{BOTTOM_UP}.res{stage + 2}.{block}"
                if self.bottlenecks:
                    convs = [(width, in_channels, 1, 1), (width, width, 3, 3)]
                    convs.append((out_channels, width, 1, 1))
                else:
                    convs = [(width, in_channels, 3, 3), (width, width, 3, 3)]
                for i, shape in enumerate(convs, start=1):
                    names = f"{theirs}.conv{i}", f"{theirs}.bn{i}", f"{ours}.conv{i}"
                    layout.update(_conv_with_norm(*names, *shape))
                if in_channels != out_channels:
                    names = f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut"
                    layout.update(_conv_with_norm(*names, out_channels, in_channels, 1, 1))
                in_channels = out_channels
        return layout

    def reorder(self, model: dict[str, torch.Tensor]) -> None:
        """Brings channels of converted weights into the order here, in place."""


class Swin(NamedTuple):
    embed_dim: int
    depths: tuple[int, ...]  # blocks of each stage
    num_heads: tuple[int, ...]  # of each stage
    window_size: int

    last_output = "p3"

    @property
    def name(self) -> str:
        return f"Swin Transformer of {self.embed_dim} channels and {self.depths} blocks"

    def stage_channels(self, stage: int) -> int:
        """Output channels of the stages 0 to 3."""
        return self.embed_dim * 2**stage

    def config(self) -> dict:
        """The keys of MODEL."""
        return {
            "BACKBONE": {"FREEZE_AT": 0},
            "FPN": {"BOTTOM_UP": "build_swin_backbone", "IN_FEATURES": ["p1", "p2", "p3"]},
            "SWIN": {
                "EMBED_DIM": self.embed_dim,
                "DEPTHS": list(self.depths),
                "NUM_HEADS": list(self.num_heads),
                "WINDOW_SIZE": self.window_size,
                "DROP_PATH_RATE": 0.0,  # of no use without training
            },
        }

    def layout(self) -> Layout:
        dim, patches = self.embed_dim, self.window_size**2
        names = "backbone.patch_embed.projection", f"{BOTTOM_UP}.patch_embed.proj"
        layout = layer_keys(*names, dim, 3, 4, 4)
        layout.update(layer_keys("backbone.patch_embed.norm", f"{BOTTOM_UP}.patch_embed.norm", dim))
        for stage, num_blocks in enumerate(self.depths):
            dim = self.stage_channels(stage)
            for block in range(num_blocks):
                theirs = f"backbone.stages.{stage}.blocks.{block}"
                ours = f"{BOTTOM_UP}.layers.{stage}.blocks.{block}"
                for layer, our_layer, shape in (
                    ("norm1", "norm1", (dim,)),
                    ("attn.w_msa.qkv", "attn.qkv", (3 * dim, dim)),
                    ("attn.w_msa.proj", "attn.proj", (dim, dim)),
                    ("norm2", "norm2", (dim,)),
                    ("ffn.layers.0.0", "mlp.fc1", (4 * dim, dim)),
                    ("ffn.layers.1", "mlp.fc2", (dim, 4 * dim)),
                ):
                    layout.update(layer_keys(f"{theirs}.{layer}", f"{ours}.{our_layer}", *shape))
                for name, shape in (
                    ("bias_table", ((2 * self.window_size - 1) ** 2, self.num_heads[stage])),
                    ("index", (patches, patches)),
                ):
                    name = f"relative_position_{name}"
                    layout[f"{theirs}.attn.w_msa.{name}"] = (f"{ours}.attn.{name}", shape)
            if stage < len(self.depths) - 1:
                theirs = f"backbone.stages.{stage}.downsample"
                ours = f"{BOTTOM_UP}.layers.{stage}.downsample"
                layout.update(layer_keys(f"{theirs}.norm", f"{ours}.norm", 4 * dim))
                names = f"{theirs}.reduction", f"{ours}.reduction"
                layout.update(layer_keys(*names, 2 * dim, 4 * dim, bias=False))
            if stage > 0:
                layout.update(layer_keys(f"backbone.norm{stage}", f"{BOTTOM_UP}.norm{stage}", dim))
        return layout

    def reorder(self, model: dict[str, torch.Tensor]) -> None:
        """Brings channels of converted weights into the order here, in place: where 2 x 2 patches
        are merged, mmdet has the patches of a channel together, row by row, and Detectron2 the
        channels of a patch, column by column."""
        for stage in range(len(self.depths) - 1):
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                key = f"{BOTTOM_UP}.layers.{stage}.downsample.{name}"
                by_channel = model[key].unflatten(-1, (-1, 2, 2))  # channel, row, column
                model[key] = by_channel.transpose(-3, -1).flatten(-3)


def find_backbone(weights: dict[str, torch.Tensor], path: str) -> ResNet | Swin:
    """Finds which backbone a state dict has.

    Args:
        weights: with mmdet's keys.
        path: of the file, for messages.

    Raises:
        ValueError: it is none that can be converted.
    """
    if "backbone.patch_embed.projection.weight" in weights:
        return _find_swin(weights, path)
    if "backbone.conv1.weight" not in weights:
        backbone = [key for key in weights if key.startswith("backbone.")]
        raise ValueError(
            f"{path}: the backbone has the keys {some_of(backbone)}; expected those of a ResNet "
            "(backbone.conv1.weight) or of a Swin Transformer "
            "(backbone.patch_embed.projection.weight)"
        )
    resnet = ResNet(
        bottlenecks="backbone.layer1.0.conv3.weight" in weights,
        blocks=tuple(count(weights, rf"backbone\.layer{stage}\.\d+\.") for stage in range(1, 5)),
        stem_channels=size(weights, "backbone.conv1.weight", path),
        width=size(weights, "backbone.layer1.0.conv1.weight", path),
    )
    if (resnet.bottlenecks, resnet.blocks) not in DEPTHS:
        kind = "bottleneck" if resnet.bottlenecks else "basic"
        raise ValueError(
            f"{path}: the backbone has stages of {resnet.blocks} {kind} blocks; expected a ResNet "
            f"of {', '.join(map(str, DEPTHS.values()))} layers"
        )
    return resnet


def _find_swin(weights: dict[str, torch.Tensor], path: str) -> Swin:
    if "backbone.norm0.weight" in weights:
        raise ValueError(
            f"{path}: found backbone.norm0.weight, so that the FPN reads the first stage of the "
            "Swin Transformer too; expected one that reads the last three stages"
        )
    depths = tuple(count(weights, rf"backbone\.stages\.{i}\.blocks\.\d+\.") for i in range(4))
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    side = round(size(weights, table.format(0), path) ** 0.5)  # 2 * window_size - 1
    return Swin(
        embed_dim=size(weights, "backbone.patch_embed.projection.weight", path),
        depths=depths,
        num_heads=tuple(size(weights, table.format(i), path, dim=1) for i in range(4)),
        window_size=(side + 1) // 2,
    )


def size(weights: dict[str, torch.Tensor], key: str, path: str, dim: int = 0) -> int:
    """The size of a weight.

    Raises:
        ValueError: there is no such weight.
    """
    value = weights.get(key)
    if not isinstance(value, torch.Tensor) or value.dim() <= dim:
        found = "no such key" if value is None else shape_of(value)
        raise ValueError(f"{path}: {key}: found {found}, expected a weight")
    return value.shape[dim]


def count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    """How many different beginnings of keys fit a pattern."""
    return len({match[0] for match in map(re.compile(pattern).match, weights) if match})


def _conv_with_norm(conv: str, norm: str, ours: str, *shape: int) -> Layout:
    layout = layer_keys(conv, ours, *shape, bias=False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        layout[f"{norm}.{name}"] = (f"{ours}.norm.{name}", shape[:1])
    return layout
