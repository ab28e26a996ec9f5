"""LabelEnc as a training method: its losses in step 1 (Eq. 9) and step 2 (Eq. 7)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from plaindet.engine import (
    DetectorAdapter,
    Method,
    Seen,
    Teacher,
    adapter_of,
    build_teacher,
    check_teacher_classes,
    register_method,
)

from .config import add_labelenc_config
from .dataset_mapper import LabelMaps
from .distance import FeatureAdapter, feature_distance
from .hook import build_labelenc_hook
from .label_encoder import build_label_encoder
from .label_map import LabelMap
from .pictures import feature_picture, label_map_picture
from .step1_file import FILE_NAME, inherit_step1_file, inherit_teacher, save_step1_file


@register_method
class LabelEnc(Method):
    """LabelEnc, step 1 or step 2, for a detector whose head reads a pyramid of features.

    It has a label encoder h(y; psi) and a feature adapter A(.; phi), for training only. The label
    maps y come with the samples of the training data, see :class:`LabelMaps`.
    """

    name = "LabelEnc"
    add_config = staticmethod(add_labelenc_config)

    def __init__(
        self,
        *,
        step: int,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda_: float = 1.0,
        label_map: str = "boxes",
        norm: str = "",
        teacher: Teacher | Callable[[], Teacher] | bool = False,
        step1_file: str | None = None,
        inherit: bool = True,
        warmup_iters: int | None = None,
        step1_iters: int | None = None,
        cutoff_iters: int | None = None,
    ):
        """
        Args:
            step: 1 or 2.
            lambda1, lambda2: weights of L2 and L3 in step 1 (Eq. 9).
            lambda_: weight of the auxiliary loss in step 2 (Eq. 7).
            label_map: what the label maps of the samples are drawn from, "boxes" or "masks": the
                same in both steps.
            norm: normalisation of the label encoder's FPN, the same as the detector's.
            teacher: supervises step 2 in place of a label encoder ("vanilla KD", Sec. 4.4). It may
                be built when it is needed, or come later by :meth:`set_feature_teacher` (True).
            step1_file, inherit, warmup_iters, step1_iters, cutoff_iters: of a LazyConfig, as the
                keys of MODEL.LABELENC. They are for the trainer, so with one of them a training
                needs the hook of LabelEnc. None: the trainer knows, or the default of the key.

        Raises:
            ValueError: an unknown step, or a teacher in step 1.
        """
        super().__init__()
        if step not in (1, 2):
            raise ValueError(f"MODEL.LABELENC.STEP is {step}, expected 1 or 2")
        if step == 1 and teacher:
            raise ValueError(
                "MODEL.LABELENC.STEP is 1, which trains the label encoder. A teacher "
                "(MODEL.LABELENC.TEACHER) takes its place in step 2"
            )
        self.step = step
        self.label_map = label_map
        self.lambda1 = lambda1
        self.lambda_ = lambda_
        self.norm = norm
        self.settings = {
            "STEP1_FILE": step1_file,
            "INHERIT": inherit,
            "WARMUP_ITERS": warmup_iters,
            "STEP1_ITERS": step1_iters,
            "CUTOFF_ITERS": cutoff_iters,
        }
        given = (step1_file, warmup_iters, step1_iters, cutoff_iters)
        self.lacks_hook = any(value is not None for value in given)
        self.distance_weight = lambda2 if step == 1 else lambda_
        # Whether L3 counts in this iteration: set by the hook.
        self.distance_enabled = True
        # Without L2 and L3 nothing is trained on images (Table 2, "reconstruction loss only").
        self.trains_detector = step == 2 or lambda1 != 0 or lambda2 != 0
        self.label_encoder: FPN | None = None
        self.feature_teacher: Teacher | None = None
        self._given_teacher = teacher

    @classmethod
    def from_config(cls, cfg, adapter, with_teacher=True):
        labelenc = cfg.MODEL.LABELENC
        teacher = bool(labelenc.TEACHER.CONFIG_FILE)
        if teacher and with_teacher and labelenc.STEP == 2:
            teacher = partial(_build_teacher, cfg)
        return cls(
            step=labelenc.STEP,
            lambda1=labelenc.LAMBDA1,
            lambda2=labelenc.LAMBDA2,
            lambda_=labelenc.LAMBDA,
            label_map=labelenc.LABEL_MAP,
            norm=cfg.MODEL.FPN.NORM,
            teacher=teacher,
        )

    @staticmethod
    def scale_iterations(cfg, factor):
        for key in ("WARMUP_ITERS", "STEP1_ITERS", "CUTOFF_ITERS"):
            cfg.MODEL.LABELENC[key] = int(round(cfg.MODEL.LABELENC[key] / factor))

    @classmethod
    def sample_additions(cls, cfg):
        """The label map, unless a teacher takes its place."""
        return [] if cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE else [LabelMaps.from_config(cfg)]

    def write_settings(self, cfg: CfgNode) -> None:
        labelenc = cfg.MODEL.LABELENC
        labelenc.STEP, labelenc.LAMBDA1, labelenc.LAMBDA = self.step, self.lambda1, self.lambda_
        labelenc.update({key: x for key, x in self.settings.items() if x is not None})
        if self._given_teacher:
            labelenc.TEACHER.CONFIG_FILE = "of the config"

    def check_others(self, others: Sequence[Method]) -> None:
        if others and self.step == 1:
            names = " and ".join(method.name for method in others)
            raise ValueError(
                f"MODEL.LABELENC.STEP is 1, but together with {names} LabelEnc trains step 2. "
                "Step 1 has LabelEnc alone"
            )

    def attach(self, adapter: DetectorAdapter) -> None:
        """Takes the detector, and builds label encoder and feature adapter."""
        super().attach(adapter)
        detector, shapes, encoder = adapter.detector, adapter.feature_shapes, None
        if not self._given_teacher:
            encoder = build_label_encoder(detector.backbone, adapter.num_classes, self.norm, shapes)
            self._check_features("The label encoder", encoder.output_shape())
        channels = next(iter(shapes.values())).channels
        # Before the encoder, in which order optimizers know them.
        self.feature_adapter = FeatureAdapter(channels)
        # Step 2 takes psi* as a constant.
        self.label_encoder = encoder and encoder.requires_grad_(self.step == 1)
        if not self.trains_detector:
            for part in adapter.feature_parts:
                detector.get_submodule(part).requires_grad_(False)
            self.feature_adapter.requires_grad_(False)
        if isinstance(self._given_teacher, Teacher):
            self.set_feature_teacher(self._given_teacher)
        elif callable(self._given_teacher):
            self.set_feature_teacher(self._given_teacher())

    @property
    def detection_weight(self) -> float:
        return self.lambda1 if self.step == 1 else 1.0

    def set_feature_teacher(self, teacher: Teacher) -> None:
        """Supervises step 2 with a trained detector, and not with the label encoder.

        Raises:
            ValueError: its features are unlike the detector's, or its images are of a format into
                which the detector's cannot be turned.
        """
        teacher.check_input_format(self.adapter.input_format)
        self._check_features("The teacher", adapter_of(teacher.model).feature_shapes)
        self.feature_teacher = teacher

    def _check_features(self, name: str, found: dict[str, ShapeSpec]) -> None:
        expected = self.adapter.feature_shapes
        if found != expected:
            raise ValueError(
                f"{name}'s features are {found}, the detector's {expected}: they have to be equal"
            )

    def train(self, mode: bool = True):
        """Sets the mode; in step 2 the label encoder stays in eval mode, so that norms in its FPN
        are constant too."""
        super().train(mode)
        if self.step == 2 and self.label_encoder is not None:
            self.label_encoder.eval()
        return self

    def begin_step2(self) -> None:
        """Goes on as step 2 in a run that began as step 1. The parameters of the label encoder get
        gradients of 0, which the engine removes."""
        self.step = 2
        self.distance_weight = self.lambda_
        self.train(self.training)

    def idle_parameters(self) -> Iterable[nn.Parameter]:
        if not self.distance_enabled:
            yield from self.feature_adapter.parameters()
        if self.step == 2 and self.label_encoder is not None:
            yield from self.label_encoder.parameters()

    def start(self, cfg: CfgNode) -> None:
        """Step 2 takes the label encoder, the head and the FPN from `MODEL.LABELENC.STEP1_FILE`, or
        the head and the FPN from the teacher."""
        labelenc = cfg.MODEL.LABELENC
        if self.step == 1:
            return
        if not labelenc.TEACHER.CONFIG_FILE:
            inherit_step1_file(self, labelenc.STEP1_FILE, labelenc.INHERIT, cfg.DATASETS.TRAIN[0])
        elif labelenc.INHERIT:
            inherit_teacher(self, labelenc.TEACHER.CONFIG_FILE)

    def build_hooks(self, cfg: CfgNode, additions: Sequence[Callable]) -> list[HookBase]:
        # A mapper of somebody else goes on drawing label maps.
        label_maps = next((x for x in additions if isinstance(x, LabelMaps)), None)
        hook = build_labelenc_hook(cfg, self, label_maps)
        hook.step1_file = ""  # which is written with the checkpoints
        return [hook]

    def write_files(self, output_dir: str, class_names: Sequence[str] | None) -> None:
        """The step-1 file, in step 1."""
        if self.step == 1:
            save_step1_file(self, os.path.join(output_dir, FILE_NAME), class_names)

    def losses(self, batched_inputs: list[dict], seen: Seen | None) -> dict[str, torch.Tensor]:
        """What comes to the detector's losses on image features (L2, or L_det in step 2), for
        inputs with a `"label_map"`:

        * `loss_reconstruction_*`: the same on label encodings (L1, step 1)
        * `loss_distance`: L3, or the auxiliary loss of step 2; 0 while it is switched off
        """
        if self.lacks_hook:
            raise RuntimeError(
                "This training would lose what LabelEnc does in its course: its phases, and the "
                "step-1 file, which step 1 writes and step 2 starts from. Train the config with "
                "this project's train_net.py (boosters-train), or register a LabelEncHook in a "
                "trainer of your own, as docs/lazyconfig.md says"
            )
        if self.step == 2:
            return {"loss_distance": self.auxiliary_loss(batched_inputs, seen)}
        detector = self.adapter.detector
        images = seen.images if seen else detector.preprocess_image(batched_inputs)
        encodings = self.encode(batched_inputs, images)
        with get_event_storage().name_scope("reconstruction"):
            reconstruction = self.adapter.losses_on(encodings, batched_inputs, seen)  # L1
        losses = {
            "loss_reconstruction_" + name.removeprefix("loss_"): loss
            for name, loss in reconstruction.items()
        }
        if seen:
            losses["loss_distance"] = self.distance_loss(seen.features, encodings)  # L3
            self._visualize(batched_inputs, seen.features, encodings)
        return losses

    def auxiliary_loss(self, batched_inputs: list[dict], seen: Seen) -> torch.Tensor:
        """lambda L_aux of Eq. 7: the distance of image features to h(y), a constant."""
        encodings = None
        if self.distance_enabled:
            with torch.no_grad():
                encodings = self.encode(batched_inputs, seen.images)
            self._visualize(batched_inputs, seen.features, encodings)
        loss = self.distance_loss(seen.features, encodings)
        if self.label_encoder is not None:
            # Only after begin_step2: DistributedDataParallel knows them as trained.
            trained = [x for x in self.label_encoder.parameters() if x.requires_grad]
            loss = loss + 0.0 * sum(x.sum() for x in trained)
        return loss

    def encode(self, batched_inputs: list[dict], images: ImageList) -> dict[str, torch.Tensor]:
        """h(y) of the batch, or the teacher's features in its place."""
        if self.feature_teacher is not None:
            teacher, adapter = self.feature_teacher, self.adapter
            features = teacher.features(batched_inputs, adapter.input_format, adapter.device)
            return adapter_of(teacher.model).levels(features)
        if self.label_encoder is None:
            raise RuntimeError(
                "LabelEnc was built without a label encoder, and set_feature_teacher was not called"
            )
        encodings = self.label_encoder(self.preprocess_label_maps(batched_inputs, images))
        size, shapes = images.tensor.shape[-2:], self.adapter.feature_shapes
        return {
            name: _cropped(encoding, [-(-x // shapes[name].stride) for x in size])
            for name, encoding in encodings.items()
        }

    def distance_loss(
        self, features: dict[str, torch.Tensor], encodings: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """lambda * L_dis(f(I), h(y)) of Eq. 10, or 0 while it is switched off."""
        if not self.distance_enabled:
            # DistributedDataParallel wants a gradient of every parameter in every iteration. The
            # engine removes these zeros before the optimizer sees them.
            return 0.0 * sum(parameter.sum() for parameter in self.feature_adapter.parameters())
        adapted = [self.feature_adapter(features[name]) for name in encodings]
        # Without padding a pyramid may round its sizes down.
        targets = [_cropped(x, y.shape[-2:]) for x, y in zip(encodings.values(), adapted)]
        return self.distance_weight * feature_distance(adapted, targets)

    def preprocess_label_maps(
        self, batched_inputs: list[dict], images: ImageList
    ) -> list[LabelMap]:
        """Moves the label maps to the model's device and pads them to the size of the batch, and
        further to what the encoder's FPN divides it by."""
        num_classes = self.label_encoder.bottom_up.num_classes
        divisor = self.label_encoder.size_divisibility
        size = tuple(-(-x // divisor) * divisor for x in images.tensor.shape[-2:])
        label_maps = []
        for inputs in batched_inputs:
            if "label_map" not in inputs:
                raise KeyError(
                    "LabelEnc needs a 'label_map' in its training inputs, found only "
                    f"{sorted(inputs)}: build the data loader with LabelMapDatasetMapper"
                )
            inputs["label_map"].check_classes(num_classes)
            label_maps.append(inputs["label_map"].to(self.adapter.device).pad(size))
        return label_maps

    def _visualize(self, batched_inputs, features, encodings) -> None:
        """Every VIS_PERIOD iterations, the first image's label map and features to the storage of
        the main process, the only one that is written and emptied."""
        storage = get_event_storage()
        vis_period = self.adapter.vis_period
        if vis_period <= 0 or storage.iter % vis_period != 0 or not comm.is_main_process():
            return
        image = batched_inputs[0]["image"]
        if self.feature_teacher is None:
            rgb = convert_image_to_rgb(image.permute(1, 2, 0), self.adapter.input_format)
            picture = label_map_picture(rgb, batched_inputs[0]["label_map"])
            storage.put_image("label_map", picture.transpose(2, 0, 1))
        level = list(encodings)[min(1, len(encodings) - 1)]
        stride = self.adapter.feature_shapes[level].stride
        pictures = [
            feature_picture(x[level][0], stride, image.shape[-2:]) for x in (features, encodings)
        ]
        source = "label encoding" if self.feature_teacher is None else "teacher"
        storage.put_image(
            f"features_{level}: image | {source}", np.hstack(pictures).transpose(2, 0, 1)
        )


def _cropped(features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    height, width = size
    return features[..., :height, :width]


def _build_teacher(cfg: CfgNode) -> Teacher:
    teacher = build_teacher(cfg.MODEL.LABELENC.TEACHER, cfg.MODEL.DEVICE, "MODEL.LABELENC.TEACHER")
    check_teacher_classes(teacher, cfg)
    return teacher
