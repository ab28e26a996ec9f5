"""LabelEnc for a detector: its training losses in step 1 (Eq. 9) and step 2 (Eq. 7)."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from plaindet.modeling import Teacher, TrainingOnlyModules

from .distance import FeatureAdapter, feature_distance
from .label_encoder import build_label_encoder
from .label_map import LabelMap
from .pictures import feature_picture, label_map_picture


class LabelEncDetector(TrainingOnlyModules):
    """What LabelEnc adds to the training of a Detectron2 meta-architecture.

    Put it before the meta-architecture, and say how that gets losses from features::

        @META_ARCH_REGISTRY.register()
        class LabelEncMyDetector(LabelEncDetector, MyDetector):
            def losses_from_features(self, images, features, gt_instances):
                ...

    The meta-architecture needs a `backbone` that is an FPN, `preprocess_image` and `device`, as
    Detectron2's have them; with `vis_period` and `input_format` it gets pictures in TensorBoard.

    In inference, and in its state dict, it is the plain meta-architecture. The label encoder and
    the feature adapter exist for training only, in `training_only`.
    """

    @configurable
    def __init__(
        self,
        *,
        label_encoder: FPN | None,
        step: int,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda_: float = 1.0,
        label_map: str = "boxes",
        **detector,
    ):
        """
        Args:
            label_encoder: h(y; psi), see :func:`build_label_encoder`. None where a teacher
                supervises, see :meth:`set_feature_teacher`.
            step: 1 or 2.
            lambda1, lambda2: weights of L2 and L3 in step 1 (Eq. 9).
            lambda_: weight of the auxiliary loss in step 2 (Eq. 7).
            label_map: what the label maps of the inputs are drawn from, "boxes" or "masks": the
                same in both steps.
            detector: the arguments of the plain meta-architecture.

        Raises:
            ValueError: an unknown step, or encodings unlike the detector's features.
        """
        super().__init__(**detector)
        if step not in (1, 2):
            raise ValueError(f"MODEL.LABELENC.STEP is {step}, expected 1 or 2")
        if step == 1 and label_encoder is None:
            raise ValueError(
                "MODEL.LABELENC.STEP is 1, which trains the label encoder. A teacher "
                "(MODEL.LABELENC.TEACHER) takes its place in step 2"
            )
        self.step = step
        self.label_map = label_map
        self.lambda1 = lambda1
        self.lambda_ = lambda_
        self.distance_weight = lambda2 if step == 1 else lambda_
        # Whether L3 counts in this iteration: set by the trainer's hook.
        self.distance_enabled = True
        # Without L2 and L3 nothing is trained on images (Table 2, "reconstruction loss only").
        self.trains_image_branch = step == 2 or lambda1 != 0 or lambda2 != 0
        self._feature_teacher = None

        channels = next(iter(self.backbone.output_shape().values())).channels
        self.training_only["feature_adapter"] = FeatureAdapter(channels)
        if label_encoder is not None:
            self._check_features("The label encoder", label_encoder)
            # Step 2 takes psi* as a constant.
            self.training_only["label_encoder"] = label_encoder.requires_grad_(step == 1)
        if not self.trains_image_branch:
            self.backbone.requires_grad_(False)
            self.feature_adapter.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg):
        detector = super().from_config(cfg)
        label_encoder = None
        if not cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE:
            label_encoder = build_label_encoder(
                detector["backbone"], cls.num_label_classes(detector), cfg.MODEL.FPN.NORM
            )
        return {
            **detector,
            "label_encoder": label_encoder,
            "step": cfg.MODEL.LABELENC.STEP,
            "lambda1": cfg.MODEL.LABELENC.LAMBDA1,
            "lambda2": cfg.MODEL.LABELENC.LAMBDA2,
            "lambda_": cfg.MODEL.LABELENC.LAMBDA,
            "label_map": cfg.MODEL.LABELENC.LABEL_MAP,
        }

    @staticmethod
    def num_label_classes(detector: dict) -> int:
        """The number of classes of the detector, from the arguments of its constructor."""
        return detector["num_classes"]

    @staticmethod
    def head_settings(detector: nn.Module) -> dict:
        """What gives the weights of a head their meaning, besides its class. Step 2 refuses a
        step-1 file, or a teacher, with other settings.

        Args:
            detector: of the plain class; this one is, and so is a teacher.
        """
        return {}

    @property
    def label_encoder(self) -> FPN | None:
        """h(.; psi): from label maps to features like the backbone's."""
        return getattr(self.training_only, "label_encoder", None)

    @property
    def feature_adapter(self) -> FeatureAdapter:
        """A(.; phi) of Eq. 10."""
        return self.training_only["feature_adapter"]

    @property
    def feature_teacher(self) -> Teacher | None:
        """The detector whose features take the place of h(y) in "vanilla KD" (Sec. 4.4)."""
        return self._feature_teacher

    def set_feature_teacher(self, teacher: Teacher) -> None:
        """Supervises step 2 with a trained detector, and not with the label encoder.

        Raises:
            ValueError: its features are unlike the detector's, or its images are of a format into
                which the detector's cannot be turned.
        """
        teacher.check_input_format(getattr(self, "input_format", "BGR"))
        self._check_features("The teacher", teacher.model.backbone)
        self._feature_teacher = teacher

    def _check_features(self, name: str, network: Backbone) -> None:
        if network.output_shape() != self.backbone.output_shape():
            raise ValueError(
                f"{name}'s features are {network.output_shape()}, the detector's "
                f"{self.backbone.output_shape()}: they have to be equal"
            )

    def train(self, mode: bool = True):
        """As the plain detector; in step 2 the label encoder stays in eval mode, so that norms in
        its FPN are constant too."""
        super().train(mode)
        if self.step == 2 and self.label_encoder is not None:
            self.label_encoder.eval()
        return self

    def begin_step2(self) -> None:
        """Goes on as step 2 in a run that began as step 1. The parameters of the label encoder get
        gradients of 0, which the trainer's hook removes."""
        self.step = 2
        self.distance_weight = self.lambda_
        self.train(self.training)

    def losses_from_features(
        self, images: ImageList, features: dict[str, torch.Tensor], gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """L_det(d(features), y): the training losses of the plain detector on these features.

        Args:
            images: the preprocessed images, padded to one size.
            features: as the backbone returns them.
            gt_instances: on the device of the features.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define losses_from_features")

    def reconstruction_losses(
        self, images: ImageList, encodings: dict[str, torch.Tensor], gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """L_det(d(h(y)), y), after the detection losses of the same iteration. The plain detector's
        losses, unless they keep a state that an iteration may change only once."""
        return self.losses_from_features(images, encodings, gt_instances)

    def forward(self, batched_inputs: list[dict]):
        """As the plain detector. In training the inputs have a `"label_map"` too, as
        :class:`LabelMapDatasetMapper` makes it, and the losses those of Eq. 9 or Eq. 7:

        * the plain detector's, on image features (L2, or L_det in step 2)
        * `loss_reconstruction_*`: the same on label encodings (L1, step 1)
        * `loss_distance`: L3, or the auxiliary loss of step 2; 0 while it is switched off
        """
        if not self.training:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        losses_of_step = self.step1_losses if self.step == 1 else self.step2_losses
        return losses_of_step(batched_inputs, images)

    def step1_losses(
        self, batched_inputs: list[dict], images: ImageList
    ) -> dict[str, torch.Tensor]:
        """L1 + lambda1 L2 + lambda2 L3 of Eq. 9."""
        gt_instances = self.gt_instances(batched_inputs)
        losses, features = {}, None
        if self.trains_image_branch:
            features = self.backbone(images.tensor)
            losses = self.losses_from_features(images, features, gt_instances)
            losses = {name: self.lambda1 * loss for name, loss in losses.items()}  # L2

        encodings = self.encode(batched_inputs, images)
        with get_event_storage().name_scope("reconstruction"):
            reconstruction = self.reconstruction_losses(images, encodings, gt_instances)  # L1
        for name, loss in reconstruction.items():
            losses["loss_reconstruction_" + name.removeprefix("loss_")] = loss

        if self.trains_image_branch:
            losses["loss_distance"] = self.distance_loss(features, encodings)  # L3
            self._visualize(batched_inputs, features, encodings)
        return losses

    def step2_losses(
        self, batched_inputs: list[dict], images: ImageList
    ) -> dict[str, torch.Tensor]:
        """L_det + lambda L_aux of Eq. 7."""
        features = self.backbone(images.tensor)
        losses = self.losses_from_features(images, features, self.gt_instances(batched_inputs))
        losses["loss_distance"] = self.auxiliary_loss(batched_inputs, images, features)
        return losses

    def auxiliary_loss(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """lambda L_aux of Eq. 7: the distance of image features to h(y), a constant."""
        encodings = None
        if self.distance_enabled:
            with torch.no_grad():
                encodings = self.encode(batched_inputs, images)
            self._visualize(batched_inputs, features, encodings)
        loss = self.distance_loss(features, encodings)
        if self.label_encoder is not None:
            # Only after begin_step2: DistributedDataParallel knows them as trained.
            trained = [x for x in self.label_encoder.parameters() if x.requires_grad]
            loss = loss + 0.0 * sum(x.sum() for x in trained)
        return loss

    def gt_instances(self, batched_inputs: list[dict]) -> list[Instances]:
        """The ground truth of the batch on the model's device."""
        return [inputs["instances"].to(self.device) for inputs in batched_inputs]

    def encode(self, batched_inputs: list[dict], images: ImageList) -> dict[str, torch.Tensor]:
        """h(y) of the batch, or the teacher's features in its place."""
        if self.feature_teacher is not None:
            input_format = getattr(self, "input_format", "BGR")
            return self.feature_teacher.features(batched_inputs, input_format, self.device)
        if self.label_encoder is None:
            raise RuntimeError(
                f"{type(self).__name__} was built without a label encoder, and set_feature_teacher "
                "was not called"
            )
        return self.label_encoder(self.preprocess_label_maps(batched_inputs, images))

    def distance_loss(
        self, features: dict[str, torch.Tensor], encodings: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """lambda * L_dis(f(I), h(y)) of Eq. 10, or 0 while it is switched off."""
        if not self.distance_enabled:
            # DistributedDataParallel wants a gradient of every parameter in every iteration. The
            # trainer's hook removes these zeros before the optimizer sees them.
            return 0.0 * sum(parameter.sum() for parameter in self.feature_adapter.parameters())
        adapted = [self.feature_adapter(features[name]) for name in encodings]
        return self.distance_weight * feature_distance(adapted, list(encodings.values()))

    def preprocess_label_maps(
        self, batched_inputs: list[dict], images: ImageList
    ) -> list[LabelMap]:
        """Moves the label maps to the model's device and pads them to the size of the batch."""
        num_classes = self.label_encoder.bottom_up.num_classes
        label_maps = []
        for inputs in batched_inputs:
            if "label_map" not in inputs:
                raise KeyError(
                    f"{type(self).__name__} needs a 'label_map' in its training inputs, found only "
                    f"{sorted(inputs)}: build the data loader with LabelMapDatasetMapper"
                )
            inputs["label_map"].check_classes(num_classes)
            label_maps.append(inputs["label_map"].to(self.device).pad(images.tensor.shape[-2:]))
        return label_maps

    def _visualize(self, batched_inputs, features, encodings) -> None:
        """Every VIS_PERIOD iterations, the first image's label map and features to the storage of
        the main process, the only one that is written and emptied."""
        storage = get_event_storage()
        vis_period = getattr(self, "vis_period", 0)
        if vis_period <= 0 or storage.iter % vis_period != 0 or not comm.is_main_process():
            return
        image = batched_inputs[0]["image"]
        if self.feature_teacher is None:
            rgb = convert_image_to_rgb(image.permute(1, 2, 0), self.input_format)
            picture = label_map_picture(rgb, batched_inputs[0]["label_map"])
            storage.put_image("label_map", picture.transpose(2, 0, 1))
        level = list(encodings)[min(1, len(encodings) - 1)]
        stride = self.backbone.output_shape()[level].stride
        pictures = [
            feature_picture(x[level][0], stride, image.shape[-2:]) for x in (features, encodings)
        ]
        source = "label encoding" if self.feature_teacher is None else "teacher"
        storage.put_image(
            f"features_{level}: image | {source}", np.hstack(pictures).transpose(2, 0, 1)
        )


def anchor_settings(generator: DefaultAnchorGenerator) -> dict:
    """The anchors of a position, in the terms of MODEL.ANCHOR_GENERATOR."""
    sides = [(x[:, 2:] - x[:, :2]).cpu().double() for x in generator.cell_anchors]
    return {
        "anchor_sizes": [_unique(side.prod(dim=1).sqrt(), 1) for side in sides],
        "anchor_aspect_ratios": [_unique(side[:, 1] / side[:, 0], 3) for side in sides],
        "anchor_offset": generator.offset,
    }


def _unique(values: torch.Tensor, digits: int) -> list[float]:
    """In the order in which they come first."""
    return list(dict.fromkeys(round(value, digits) for value in values.tolist()))
