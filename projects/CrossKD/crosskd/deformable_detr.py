"""CrossKD for Deformable DETR: the student's encoder output goes through the teacher's decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision.ops import box_convert

from plaindet.engine import Teacher
from plaindet.engine.adapters import DETRAdapter

from .losses import box_loss, quality_focal_loss
from .method import CrossKD, check_equal, check_gamma, check_option

if TYPE_CHECKING:
    from plaindet.modeling.deformable_transformer import Memory, Predictions, StageInputs


class DETRCrossKD(CrossKD):
    """CrossKD for Deformable DETR (supplement, Table 3). For each decoder layer of the teacher it
    adds, with suffixes as the plain losses have them,

    * `loss_kd_cls`: D_pred of the classes
    * `loss_kd_box` (L1) and `loss_kd_giou`: D_pred of the boxes

    Each decoder layer of the teacher reads the student's memory (the encoder's output), with the
    same queries and references as when it reads the teacher's. Its predictions from the student's
    memory, the cross-head predictions, imitate those from the teacher's, which correspond to them
    one to one. The queries and references are the teacher's, so that the student's decoder learns
    from the ground truth alone, or optionally the student's.
    """

    adapter_class = DETRAdapter

    def __init__(
        self,
        *,
        queries: str = "teacher",
        cls_loss: str = "qfl",
        cls_gamma: float = 1.0,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        teacher: Teacher | Callable[[], Teacher] | None = None,
    ):
        """
        Args:
            queries: "teacher" or "student": whose queries and references go into the layers.
            cls_loss: "qfl", the quality focal loss with `cls_gamma`, or "bce".
            cls_weight: of the class loss.
            box_weight: of the L1 and the GIoU loss, beside the weights of the detection losses.
            teacher: see :class:`CrossKD`.

        Raises:
            ValueError: an option has an unknown value.
        """
        super().__init__(teacher)
        check_option("CROSSKD.QUERIES", queries, ("teacher", "student"))
        check_option("CROSSKD.CLS_LOSS", cls_loss, ("qfl", "bce"))
        check_gamma(cls_gamma)
        self.source_of_queries = queries
        self.cls_gamma = cls_gamma if cls_loss == "qfl" else 0.0
        self.cls_weight = cls_weight
        self.box_weight = box_weight

    def check_student(self):
        self.adapter.position = 0  # the encoder's output

    def build_projections(self):
        """Linear layers, where the teacher's transformer has another width."""
        both = (self.adapter, self.teacher_adapter)
        source, target = (x.detector.transformer.hidden_dim for x in both)
        if source != target:
            of_student = self.source_of_queries == "student"
            for name in ("memory", *(("queries", "positions") if of_student else ())):
                self.add_module(name, nn.Linear(source, target))

    def check_teacher(self):
        """Checks the teacher's transformer against the student's.

        Raises:
            ValueError: its classes or levels are not the student's, or with the student's queries
                its decoder layers, box refinement or stages.
        """
        both = [x.detector for x in (self.teacher_adapter, self.adapter)]
        shapes = [[x.backbone.output_shape()[name] for name in x.in_features] for x in both]
        check_equal(
            {
                "number of classes": [x.num_classes for x in both],
                "strides of the features": [
                    [shape.stride for shape in levels] for levels in shapes
                ],
                "divisor of image sizes": [x.backbone.size_divisibility for x in both],
                "number of feature levels": [x.transformer.num_levels for x in both],
            }
        )
        if self.source_of_queries == "student":
            transformers = [x.transformer for x in both]
            check_equal(
                {
                    "number of decoder layers": [x.num_stages for x in transformers],
                    "BOX_REFINEMENT": [x.box_refinement for x in transformers],
                    "TWO_STAGE": [x.two_stage for x in transformers],
                }
            )

    def losses(self, batched_inputs, seen):
        memory, decoded, num_boxes = seen.head
        teacher = self.teacher_adapter
        with torch.no_grad():
            features = self.teacher_features(batched_inputs)
            teacher_memory = teacher.detector.encode(features, seen.images)
        if self.source_of_queries == "teacher":
            with torch.no_grad():
                stages, expected, _ = teacher.detector.transformer.decode(teacher_memory)
        else:
            stages = [self._adapt_queries(inputs) for inputs in decoded.inputs]
            with torch.no_grad():
                expected = self.predictions_of_teacher(stages, teacher_memory)
        cross_head = self.predictions_of_teacher(stages, self._adapt_memory(memory))
        return self.distillation_losses(cross_head, expected, num_boxes)

    def predictions_of_teacher(
        self, stages: list[StageInputs], memory: Memory
    ) -> list[Predictions]:
        """The predictions of each decoder layer of the teacher.

        Args:
            stages: the inputs of each layer.
            memory: what the layers read, of the teacher's width.
        """
        transformer = self.teacher_adapter.detector.transformer
        return [transformer.run_stage(i, inputs, memory)[1] for i, inputs in enumerate(stages)]

    def distillation_losses(
        self, predictions: list[Predictions], expected: list[Predictions], num_boxes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """D_pred between the predictions of each layer and their constant target. The box losses of
        a query are weighted by the confidence of its target, the highest class probability; all
        are divided by the number of objects, as the detection losses are."""
        losses, weights = {}, self.adapter.detector.criterion.weights
        for i, (found, target) in enumerate(zip(predictions, expected)):
            suffix = "" if i == len(expected) - 1 else f"_{i}"
            confidence = target.logits.amax(dim=-1).sigmoid()  # r
            loss_cls = quality_focal_loss(found.logits, target.logits, self.cls_gamma)
            corners = (box_convert(x.boxes, "cxcywh", "xyxy") for x in (found, target))
            for name, weight, loss in (
                ("loss_kd_cls", self.cls_weight, loss_cls.sum(dim=-1)),
                (
                    "loss_kd_box",
                    self.box_weight * weights["loss_box_reg"],
                    box_loss(found.boxes, target.boxes, "l1") * confidence,
                ),
                (
                    "loss_kd_giou",
                    self.box_weight * weights["loss_giou"],
                    box_loss(*corners, "giou") * confidence,
                ),
            ):
                losses[name + suffix] = weight * loss.sum() / num_boxes
        return losses

    def _adapt_memory(self, memory: Memory) -> Memory:
        return memory._replace(features=self.project("memory", memory.features))

    def _adapt_queries(self, inputs: StageInputs) -> StageInputs:
        """The student's inputs of a layer for the teacher's. The references are as constant as they
        are for the layers of the student behind the first."""
        return inputs._replace(
            queries=self.project("queries", inputs.queries),
            positions=self.project("positions", inputs.positions),
            reference=inputs.reference.detach(),
        )
