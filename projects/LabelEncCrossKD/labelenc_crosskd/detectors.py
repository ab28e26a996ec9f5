"""The meta-architectures of LabelEnc and CrossKD together."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY

from crosskd import CrossKDATSS, CrossKDFCOS, CrossKDGeneralizedRCNN, CrossKDGFL, CrossKDRetinaNet
from labelenc import (
    LabelEncATSS,
    LabelEncDetector,
    LabelEncFCOS,
    LabelEncGeneralizedRCNN,
    LabelEncGFL,
    LabelEncRetinaNet,
)


class LabelEncCrossKDDetector(LabelEncDetector):
    """Step 2 of LabelEnc in which the detector also learns from a teacher by CrossKD: both methods
    act on the same image features, in one iteration. Put it before the meta-architectures of
    LabelEnc and CrossKD in a list of base classes. Neither paper has this.

    Step 1 is LabelEnc's own, with the same head. The teacher comes by `set_teacher`.
    """

    @classmethod
    def from_config(cls, cfg):
        if cfg.MODEL.LABELENC.STEP != 2:
            raise ValueError(
                f"MODEL.LABELENC.STEP is {cfg.MODEL.LABELENC.STEP}, but {cls.__name__} trains step "
                f"2: train step 1 with {cls.__name__.replace('CrossKD', '')}"
            )
        return super().from_config(cfg)

    def step2_losses(self, batched_inputs, images):
        """CrossKD's losses, which include the detector's, and LabelEnc's `loss_distance`."""
        features = self.backbone(images.tensor)
        losses = self.training_losses(batched_inputs, images, features)
        losses["loss_distance"] = self.auxiliary_loss(batched_inputs, images, features)
        return losses


@META_ARCH_REGISTRY.register()
class LabelEncCrossKDRetinaNet(LabelEncCrossKDDetector, LabelEncRetinaNet, CrossKDRetinaNet):
    """RetinaNet trained with LabelEnc and CrossKD."""


@META_ARCH_REGISTRY.register()
class LabelEncCrossKDFCOS(LabelEncCrossKDDetector, LabelEncFCOS, CrossKDFCOS):
    """FCOS trained with LabelEnc and CrossKD."""


@META_ARCH_REGISTRY.register()
class LabelEncCrossKDGFL(LabelEncCrossKDDetector, LabelEncGFL, CrossKDGFL):
    """GFL trained with LabelEnc and CrossKD."""


@META_ARCH_REGISTRY.register()
class LabelEncCrossKDATSS(LabelEncCrossKDDetector, LabelEncATSS, CrossKDATSS):
    """ATSS trained with LabelEnc and CrossKD."""


@META_ARCH_REGISTRY.register()
class LabelEncCrossKDGeneralizedRCNN(
    LabelEncCrossKDDetector, LabelEncGeneralizedRCNN, CrossKDGeneralizedRCNN
):
    """Faster R-CNN or Mask R-CNN trained with LabelEnc and CrossKD."""
