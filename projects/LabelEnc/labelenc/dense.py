"""LabelEnc for Detectron2's dense detectors."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from plaindet.modeling import ATSS, FCOS, GFL

from .detector import LabelEncDetector, anchor_settings


class LabelEncDenseDetector(LabelEncDetector):
    """LabelEnc for a Detectron2 `DenseDetector`."""

    _holds_loss_normalizer = False

    def losses_from_features(self, images, features, gt_instances):
        features = [features[name] for name in self.head_in_features]
        return self.forward_training(images, features, self.head(features), gt_instances)

    def reconstruction_losses(self, images, encodings, gt_instances):
        self._holds_loss_normalizer = self.trains_image_branch
        try:
            return super().reconstruction_losses(images, encodings, gt_instances)
        finally:
            self._holds_loss_normalizer = False

    def _ema_update(self, name, value, initial_value, momentum=0.9):
        # L1 and L2 have the same targets, so they share one normaliser, which moves once.
        if self._holds_loss_normalizer:
            return getattr(self, name)
        return super()._ema_update(name, value, initial_value, momentum)


@META_ARCH_REGISTRY.register()
class LabelEncRetinaNet(LabelEncDenseDetector, RetinaNet):
    """RetinaNet trained with LabelEnc."""

    @staticmethod
    def head_settings(detector):
        return {
            "box_weights": list(detector.box2box_transform.weights),
            **anchor_settings(detector.anchor_generator),
        }


@META_ARCH_REGISTRY.register()
class LabelEncFCOS(LabelEncDenseDetector, FCOS):
    """FCOS trained with LabelEnc."""

    @staticmethod
    def head_settings(detector):
        return {
            "normalize_distances": detector.head.normalize_distances,
            "centerness_on_box_subnet": detector.head.centerness_on_box_subnet,
        }


@META_ARCH_REGISTRY.register()
class LabelEncGFL(LabelEncDenseDetector, GFL):
    """GFL trained with LabelEnc."""


@META_ARCH_REGISTRY.register()
class LabelEncATSS(LabelEncDenseDetector, ATSS):
    """ATSS trained with LabelEnc."""

    head_settings = staticmethod(LabelEncRetinaNet.head_settings)
