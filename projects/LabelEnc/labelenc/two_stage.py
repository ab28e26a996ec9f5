"""LabelEnc for Detectron2's two-stage detectors."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from .detector import LabelEncDetector


@META_ARCH_REGISTRY.register()
class LabelEncGeneralizedRCNN(LabelEncDetector, GeneralizedRCNN):
    """Faster R-CNN or Mask R-CNN trained with LabelEnc. Image features and label encodings have
    proposals and samples of their own."""

    @staticmethod
    def num_label_classes(detector):
        return detector["roi_heads"].num_classes

    def head_settings(self):
        return {"anchor_offset": self.proposal_generator.anchor_generator.offset}

    def losses_from_features(self, images, features, gt_instances):
        proposals, proposal_losses = self.proposal_generator(images, features, gt_instances)
        _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
        return {**detector_losses, **proposal_losses}
