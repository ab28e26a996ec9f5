"""The transformer of Deformable DETR and its set loss, on the library `transformers`.

This is the one file that knows the library's internals. It needs the optional extra `[detr]`, and
importing it takes seconds, so `deformable_detr.py` imports it when a model is built.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from detectron2.layers import shapes_to_tensor
from torch import nn
from torch.nn import functional as F

try:
    import scipy.optimize  # noqa: F401, of the library's Hungarian matcher
    from transformers import DeformableDetrConfig, ResNetConfig, __version__
    from transformers.loss.loss_deformable_detr import (
        DeformableDetrHungarianMatcher,
        DeformableDetrImageLoss,
    )
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMLPPredictionHead,
        DeformableDetrModel,
        inverse_sigmoid,
    )
except ImportError as error:
    raise ImportError(
        "DeformableDETR needs the optional extra [detr] of this project, transformers from 5.9 to "
        f"below 6, and scipy: pip install -e '.[detr]' ({error})"
    ) from error
# Before 5.9 its position embeddings have other shapes.
if not (5, 9) <= tuple(map(int, __version__.split(".")[:2])) < (6,):
    raise ImportError(
        f"DeformableDETR needs transformers from 5.9 to below 6, found {__version__}: "
        "pip install -e '.[detr]'"
    )

FOCAL_ALPHA = 0.25  # the library's matcher has the same
GROUPS = 32  # of the group norm behind each input projection


class Memory(NamedTuple):
    """The encoder's output, S positions of all levels, with what the decoder needs to read it."""

    features: torch.Tensor  # (N, S, hidden_dim)
    mask: torch.Tensor  # (N, S) bool, False for padding
    valid_ratios: torch.Tensor  # (N, levels, 2), of width and height: the part that is no padding
    spatial_shapes: torch.Tensor  # (levels, 2), height and width
    spatial_shapes_list: list[tuple[int, int]]
    level_start_index: torch.Tensor  # (levels,)


class StageInputs(NamedTuple):
    """What a decoder layer gets beside the memory."""

    queries: torch.Tensor  # (N, Q, hidden_dim)
    positions: torch.Tensor  # (N, Q, hidden_dim), the position embeddings
    # (N, Q, 2) points (x, y) or (N, Q, 4) boxes (x, y, w, h), in 0..1 of the image without padding.
    reference: torch.Tensor


class Predictions(NamedTuple):
    """What a prediction head says of each query."""

    logits: torch.Tensor  # (N, Q, num_classes), float32
    boxes: torch.Tensor  # (N, Q, 4) centre and size, in 0..1 of the image without padding, float32


class Decoded(NamedTuple):
    """Everything that the decoder computed."""

    inputs: list[StageInputs]  # of each layer
    predictions: list[Predictions]  # of each layer
    proposals: Predictions | None  # of all S positions of the memory, in the two-stage variant


class DeformableTransformer(nn.Module):
    """Projections of the backbone's features, encoder, decoder and prediction heads of Deformable
    DETR (Zhu et al., ICLR 2021). State dict keys are those of the library's
    `DeformableDetrForObjectDetection`, with one prediction head where all layers share it."""

    def __init__(
        self,
        *,
        in_channels: list[int],
        num_classes: int,
        num_levels: int = 4,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        feedforward_dim: int = 1024,
        num_points: int = 4,
        num_queries: int = 300,
        dropout: float = 0.1,
        box_refinement: bool = False,
        two_stage: bool = False,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: of the backbone's features, the finest level first.
            num_classes: of the logits.
            num_levels: of the transformer: those of the backbone, and more by 3x3 convolutions of
                stride 2, the first of them on the last feature of the backbone.
            num_points: sampled by each attention head in each level (K in the paper).
            box_refinement: whether each decoder layer refines the boxes of the one before.
            two_stage: whether the encoder's best proposals are the queries.
            prior_prob: class probability at the start of the training.

        Raises:
            ValueError: options that do not go together.
        """
        super().__init__()
        if hidden_dim % GROUPS or hidden_dim % num_heads:
            raise ValueError(
                f"MODEL.DEFORMABLE_DETR.HIDDEN_DIM is {hidden_dim}, expected a multiple of "
                f"{GROUPS} and of NUM_HEADS {num_heads}"
            )
        if num_levels < len(in_channels):
            raise ValueError(
                f"MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS is {num_levels}, expected at least the "
                f"{len(in_channels)} of IN_FEATURES"
            )
        if two_stage and not box_refinement:
            raise ValueError("MODEL.DEFORMABLE_DETR.TWO_STAGE needs BOX_REFINEMENT")
        self.box_refinement = box_refinement
        self.two_stage = two_stage
        self.num_queries = num_queries
        self.model = DeformableDetrModel(
            DeformableDetrConfig(
                # Tells the library the widths; the network that it makes is thrown away below.
                backbone_config=ResNetConfig(
                    embedding_size=in_channels[0],
                    hidden_sizes=list(in_channels),
                    depths=[1] * len(in_channels),
                    out_indices=list(range(1, len(in_channels) + 1)),
                ),
                num_feature_levels=num_levels,
                d_model=hidden_dim,
                encoder_attention_heads=num_heads,
                decoder_attention_heads=num_heads,
                encoder_layers=num_encoder_layers,
                decoder_layers=num_decoder_layers,
                encoder_ffn_dim=feedforward_dim,
                decoder_ffn_dim=feedforward_dim,
                encoder_n_points=num_points,
                decoder_n_points=num_points,
                num_queries=num_queries,
                two_stage_num_proposals=num_queries,
                dropout=dropout,
                with_box_refine=box_refinement,
                two_stage=two_stage,
            )
        )
        self.model.backbone = nn.Identity()
        # With refinement each layer has predictors of its own, and so have the proposals.
        num_predictors = num_decoder_layers + two_stage if box_refinement else 1
        self.class_embed = nn.ModuleList(
            nn.Linear(hidden_dim, num_classes) for _ in range(num_predictors)
        )
        self.bbox_embed = nn.ModuleList(
            DeformableDetrMLPPredictionHead(hidden_dim, hidden_dim, 4, num_layers=3)
            for _ in range(num_predictors)
        )
        self._initialize(prior_prob)

    def _initialize(self, prior_prob: float) -> None:
        """As the paper's code; the library only means to load trained weights."""
        for name, module in self.model.named_modules():
            # The deformable attention is as in the paper already.
            if name.endswith(("sampling_offsets", "attention_weights")):
                continue
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        for class_head, box_head in zip(self.class_embed, self.bbox_embed):
            nn.init.constant_(class_head.bias, -math.log((1 - prior_prob) / prior_prob))
            nn.init.zeros_(box_head.layers[-1].weight)
            nn.init.zeros_(box_head.layers[-1].bias)
        if not self.two_stage:  # from points to boxes: 0.12 of the image at first
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    @property
    def hidden_dim(self) -> int:
        return self.model.config.d_model

    @property
    def num_levels(self) -> int:
        return len(self.model.input_proj)

    @property
    def num_stages(self) -> int:
        """The number of decoder layers."""
        return len(self.model.decoder.layers)

    def project(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """The levels that the encoder reads, (N, hidden_dim, Hi, Wi).

        Args:
            features: (N, channels, Hi, Wi) of the backbone, the finest level first.
        """
        levels = []
        for i, projection in enumerate(self.model.input_proj):
            if i < len(features):
                levels.append(projection(features[i]))
            else:
                levels.append(projection(features[-1] if i == len(features) else levels[-1]))
        return levels

    def encode(self, features: list[torch.Tensor], pixel_mask: torch.Tensor) -> Memory:
        """Runs the input projections and the encoder.

        Args:
            features: (N, channels, Hi, Wi) of the backbone, the finest level first.
            pixel_mask: (N, H, W) bool, False for padding.
        """
        model = self.model
        levels, masks, positions = self.project(features), [], []
        for i, level in enumerate(levels):
            mask = F.interpolate(pixel_mask[None].float(), size=level.shape[-2:])[0].bool()
            position = model.position_embedding(level.shape, level.device, torch.float32, mask)
            masks.append(mask)
            positions.append(position.flatten(2).transpose(1, 2) + model.level_embed[i])
        shapes_list = [tuple(level.shape[-2:]) for level in levels]
        shapes = torch.stack([shapes_to_tensor(list(shape)) for shape in shapes_list])
        shapes = shapes.to(pixel_mask.device, non_blocking=True)
        mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        valid_ratios = torch.stack([model.get_valid_ratio(mask) for mask in masks], dim=1)
        sizes = shapes.prod(dim=1)
        level_start_index = sizes.cumsum(dim=0) - sizes
        features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        positions = torch.cat(positions, dim=1)
        reference = encoder_reference_points(shapes_list, valid_ratios)
        features = F.dropout(features, model.encoder.dropout, self.training)
        # Layer by layer, since the library's encoder makes reference points that are constants in
        # a traced model.
        for layer in model.encoder.layers:
            features = layer(
                features,
                attention_mask=mask,
                spatial_position_embeddings=positions,
                reference_points=reference,
                spatial_shapes=shapes,
                spatial_shapes_list=shapes_list,
                level_start_index=level_start_index,
            )
        return Memory(features, mask, valid_ratios, shapes, shapes_list, level_start_index)

    def decode(self, memory: Memory) -> Decoded:
        """Runs all decoder layers."""
        stage_inputs, proposals = self._first_inputs(memory)
        decoded = Decoded([], [], proposals)
        for stage in range(self.num_stages):
            queries, predictions = self.run_stage(stage, stage_inputs, memory)
            decoded.inputs.append(stage_inputs)
            decoded.predictions.append(predictions)
            stage_inputs = stage_inputs._replace(queries=queries)
            if self.box_refinement:
                stage_inputs = stage_inputs._replace(reference=predictions.boxes.detach())
        return decoded

    def run_stage(
        self, stage: int, inputs: StageInputs, memory: Memory
    ) -> tuple[torch.Tensor, Predictions]:
        """Runs a decoder layer and its prediction head.

        Args:
            stage: the number of the layer, from 0.

        Returns:
            queries (N, Q, hidden_dim) for the next layer, and the predictions
        """
        # From the image to the padded level; points have one (x, y), boxes two pairs.
        pairs = inputs.reference.shape[-1] // 2
        reference = inputs.reference[:, :, None] * memory.valid_ratios.repeat(1, 1, pairs)[:, None]
        queries = self.model.decoder.layers[stage](
            inputs.queries,
            object_queries_position_embeddings=inputs.positions,
            reference_points=reference,
            spatial_shapes=memory.spatial_shapes,
            spatial_shapes_list=memory.spatial_shapes_list,
            level_start_index=memory.level_start_index,
            encoder_hidden_states=memory.features,
            encoder_attention_mask=memory.mask,
        )
        head = stage if self.box_refinement else 0
        offsets = self.bbox_embed[head](queries).float()
        start = F.pad(inverse_sigmoid(inputs.reference), (0, 4 - inputs.reference.shape[-1]))
        logits = self.class_embed[head](queries).float()
        return queries, Predictions(logits, (offsets + start).sigmoid())

    def _first_inputs(self, memory: Memory) -> tuple[StageInputs, Predictions | None]:
        """The learned queries, or in the two-stage variant the encoder's best proposals."""
        model = self.model
        if not self.two_stage:
            embeddings = model.query_position_embeddings.weight
            embeddings = embeddings.expand(len(memory.features), -1, -1)
            positions, queries = embeddings.chunk(2, dim=-1)
            reference = model.reference_points(positions).float().sigmoid()
            return StageInputs(queries, positions, reference), None
        features, start = model.gen_encoder_output_proposals(
            memory.features, ~memory.mask, memory.spatial_shapes_list
        )
        logits = self.class_embed[-1](features).float()
        box_logits = self.bbox_embed[-1](features).float() + start
        # The proposals know one class, the first.
        best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices
        best_logits = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        embeddings = model.pos_trans_norm(
            model.pos_trans(model.get_proposal_pos_embed(best_logits))
        )
        positions, queries = embeddings.chunk(2, dim=-1)
        proposals = Predictions(logits, box_logits.sigmoid())
        return StageInputs(queries, positions, best_logits.sigmoid()), proposals


def encoder_reference_points(
    shapes: list[tuple[int, int]], valid_ratios: torch.Tensor
) -> torch.Tensor:
    """Where the encoder's positions are: their centres, in 0..1 of each padded level.

    Args:
        shapes: height and width of each level.
        valid_ratios: as in :class:`Memory`.

    Returns:
        (N, S, levels, 2), x and y
    """
    points = []
    for (height, width), ratio in zip(shapes, valid_ratios.unbind(dim=1)):
        centers = [torch.arange(size, device=ratio.device) + 0.5 for size in (width, height)]
        x = centers[0] / (ratio[:, :1] * width)
        y = centers[1] / (ratio[:, 1:] * height)
        x, y = x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
        points.append(torch.stack([x, y], dim=-1).flatten(1, 2))
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]


class SetCriterion(DeformableDetrImageLoss):
    """The losses after Hungarian matching, both the library's."""

    def __init__(
        self,
        *,
        num_classes: int,
        cls_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
    ):
        """
        Args:
            cls_weight, l1_weight, giou_weight: of the focal class loss, the L1 distance of boxes in
                0..1 and 1 - GIoU, in the matching cost as in the loss.
        """
        matcher = DeformableDetrHungarianMatcher(cls_weight, l1_weight, giou_weight)
        super().__init__(matcher, num_classes, FOCAL_ALPHA, losses=["labels", "boxes"])
        self.weights = {
            "loss_cls": cls_weight,
            "loss_box_reg": l1_weight,
            "loss_giou": giou_weight,
        }

    def forward(
        self, predictions: Predictions, targets: list[dict], num_boxes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of the predictions of one decoder layer.

        Args:
            targets: for each image "class_labels" (G,) and "boxes" (G, 4) as predictions have them.
            num_boxes: scalar, what the losses are divided by.

        Returns:
            "loss_cls", "loss_box_reg" (L1) and "loss_giou", weighted

        Raises:
            FloatingPointError: a predicted box or score is infinite or NaN.
        """
        outputs = {"logits": predictions.logits, "pred_boxes": predictions.boxes}
        arguments = (outputs, targets, self._match(outputs, targets), num_boxes)
        found = {**self.loss_labels(*arguments), **self.loss_boxes(*arguments)}
        losses = {
            "loss_cls": found["loss_ce"],
            "loss_box_reg": found["loss_bbox"],
            "loss_giou": found["loss_giou"],
        }
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _match(self, outputs: dict, targets: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not any(len(target["boxes"]) for target in targets):  # which the library cannot
            none = torch.empty(0, dtype=torch.int64)
            return [(none, none)] * len(targets)
        try:
            return self.matcher(outputs, targets)
        except ValueError as error:  # the library's check of the boxes, scipy's of the costs
            if all(prediction.isfinite().all() for prediction in outputs.values()):
                raise
            raise FloatingPointError("Predicted boxes or scores are infinite or NaN") from error
