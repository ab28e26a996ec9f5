"""Deformable DETR (Zhu et al., ICLR 2021) on Detectron2's backbones. The transformer is the library
`transformers`' (see deformable_transformer.py), which is imported when a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.ops import box_convert

from .losses import mean_over_processes

if TYPE_CHECKING:
    from .deformable_transformer import (
        Decoded,
        DeformableTransformer,
        Memory,
        Predictions,
        SetCriterion,
    )


@META_ARCH_REGISTRY.register()
class DeformableDETR(nn.Module):
    """Deformable DETR, optionally with iterative box refinement and two stages."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        transformer: DeformableTransformer,
        criterion: SetCriterion,
        num_classes: int,
        in_features: list[str],
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        input_format: str = "BGR",
        max_detections_per_image: int = 100,
    ):
        """
        Args:
            backbone: a Detectron2 backbone.
            num_classes: as in transformer and criterion.
            in_features: the backbone's features that the transformer gets, the finest first.
            pixel_mean, pixel_std: of the images' channels.
            input_format: the channel order of the images, "BGR" or "RGB".
            max_detections_per_image: the best (query, class) pairs that are kept in inference.
        """
        super().__init__()
        self.backbone = backbone
        self.transformer = transformer
        self.criterion = criterion
        self.num_classes = num_classes
        self.in_features = in_features
        self.input_format = input_format
        self.max_detections_per_image = max_detections_per_image
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        from .deformable_transformer import DeformableTransformer, SetCriterion

        detr = cfg.MODEL.DEFORMABLE_DETR
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "transformer": DeformableTransformer(
                in_channels=[shapes[name].channels for name in detr.IN_FEATURES],
                num_classes=detr.NUM_CLASSES,
                num_levels=detr.NUM_FEATURE_LEVELS,
                hidden_dim=detr.HIDDEN_DIM,
                num_heads=detr.NUM_HEADS,
                num_encoder_layers=detr.NUM_ENCODER_LAYERS,
                num_decoder_layers=detr.NUM_DECODER_LAYERS,
                feedforward_dim=detr.FEEDFORWARD_DIM,
                num_points=detr.NUM_POINTS,
                num_queries=detr.NUM_QUERIES,
                dropout=detr.DROPOUT,
                box_refinement=detr.BOX_REFINEMENT,
                two_stage=detr.TWO_STAGE,
                prior_prob=detr.PRIOR_PROB,
            ),
            "criterion": SetCriterion(
                num_classes=detr.NUM_CLASSES,
                cls_weight=detr.CLS_WEIGHT,
                l1_weight=detr.L1_WEIGHT,
                giou_weight=detr.GIOU_WEIGHT,
            ),
            "num_classes": detr.NUM_CLASSES,
            "in_features": detr.IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """The losses of a batch in training, its detections in inference.

        Args:
            batched_inputs: Detectron2's: "image" (3, H, W); in training "instances" with `gt_boxes`
                and `gt_classes`; in inference optionally "height" and "width" of the output.

        Returns:
            in training the losses, see :meth:`losses`; in inference a list of {"instances"} with
            `pred_boxes`, `scores`, `pred_classes`, the best first
        """
        images = self.preprocess_image(batched_inputs)
        memory = self.encode(self.backbone(images.tensor), images)
        decoded = self.transformer.decode(memory)
        if self.training:
            return self.losses(decoded, self.targets(batched_inputs))
        results = self.inference(decoded.predictions[-1], images.image_sizes)
        return [
            {
                "instances": detector_postprocess(
                    result, x.get("height", size[0]), x.get("width", size[1])
                )
            }
            for result, x, size in zip(results, batched_inputs, images.image_sizes)
        ]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises the images and pads them to one size."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def encode(self, features: dict[str, torch.Tensor], images: ImageList) -> Memory:
        """The encoder's output from the backbone's features of some images."""
        mask = pixel_mask(images.image_sizes, images.tensor.shape[-2:], self.device)
        return self.transformer.encode([features[name] for name in self.in_features], mask)

    def targets(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """The ground truth of each image: "class_labels" (G,), and "boxes" (G, 4) as centre and
        size in 0..1 of the image."""
        targets = []
        for x in batched_inputs:
            instances = x["instances"]
            height, width = instances.image_size
            boxes = instances.gt_boxes.tensor
            scale = boxes.new_tensor([width, height, width, height])
            target = {
                "class_labels": instances.gt_classes,
                "boxes": box_convert(boxes / scale, "xyxy", "cxcywh"),
            }
            targets.append({k: v.to(self.device, non_blocking=True) for k, v in target.items()})
        return targets

    def losses(
        self, decoded: Decoded, targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The losses of all decoder layers.

        Args:
            targets: from :meth:`targets`.

        Returns:
            `loss_cls` (focal), `loss_box_reg` (L1) and `loss_giou` of the last decoder layer, with
            the suffix `_0`, `_1`, ... those of the layers before, and with `_proposals` those of
            the two-stage variant's proposals; scalars, float32
        """
        num_boxes = self.num_boxes(targets)
        *auxiliary, last = decoded.predictions
        losses = self.criterion(last, targets, num_boxes)
        others = [(f"_{i}", predictions, targets) for i, predictions in enumerate(auxiliary)]
        if decoded.proposals is not None:
            # The proposals know one class, the first, for all objects.
            objects = [
                {**target, "class_labels": torch.zeros_like(target["class_labels"])}
                for target in targets
            ]
            others.append(("_proposals", decoded.proposals, objects))
        for suffix, predictions, objects in others:
            found = self.criterion(predictions, objects, num_boxes)
            losses.update({f"{name}{suffix}": loss for name, loss in found.items()})
        return losses

    def num_boxes(self, targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The number of objects, averaged over processes, at least 1."""
        count = sum(len(target["boxes"]) for target in targets)
        count = torch.full((), float(count), device=self.device)
        return mean_over_processes(count).clamp(min=1)

    def inference(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best (query, class) pairs of each image, boxes in pixels of the network's input.

        Args:
            predictions: of the last decoder layer.
            image_sizes: (height, width) without padding.
        """
        results = []
        for logits, boxes, image_size in zip(*predictions, image_sizes):
            scores = logits.sigmoid().flatten()
            count = min(self.max_detections_per_image, len(scores))
            scores, best = scores.topk(count)
            boxes = box_convert(boxes[best // self.num_classes], "cxcywh", "xyxy")
            # A tensor in tracing, which has to stay one.
            height, width = torch.as_tensor(image_size, dtype=boxes.dtype, device=boxes.device)
            result = Instances(tuple(image_size))
            result.pred_boxes = Boxes(boxes * torch.stack([width, height, width, height]))
            result.scores = scores
            result.pred_classes = best % self.num_classes
            results.append(result)
        return results


def pixel_mask(
    image_sizes: list[tuple[int, int]], padded_size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Where a batch has images and no padding: (N, H, W) bool."""
    sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])
    sizes = sizes.to(device, non_blocking=True)
    heights, widths = sizes[..., None].unbind(dim=1)
    rows, columns = (torch.arange(size, device=device) for size in padded_size)
    return (rows < heights)[:, :, None] & (columns < widths)[:, None]
