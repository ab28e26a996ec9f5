"""LabelEnc for Detectron2's two-stage detectors."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from .detector import LabelEncDetector, anchor_settings


@META_ARCH_REGISTRY.register()
class LabelEncGeneralizedRCNN(LabelEncDetector, GeneralizedRCNN):
    """Faster R-CNN or Mask R-CNN trained with LabelEnc. Image features and label encodings have
    proposals and samples of their own."""

    @staticmethod
    def num_label_classes(detector):
        return detector["roi_heads"].num_classes

    @staticmethod
    def head_settings(detector):
        proposal_generator = detector.proposal_generator
        return {
            "proposal_box_weights": list(proposal_generator.box2box_transform.weights),
            # One list, or one for each stage of a cascade.
            "box_weights": [
                list(module.box2box_transform.weights)
                for module in detector.roi_heads.modules()
                if isinstance(module, FastRCNNOutputLayers)
            ],
            **anchor_settings(proposal_generator.anchor_generator),
        }

    def losses_from_features(self, images, features, gt_instances):
        proposals, proposal_losses = self.proposal_generator(images, features, gt_instances)
        _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
        return {**detector_losses, **proposal_losses}
