"""The meta-architectures of LabelEnc and CrossKD together."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY

from crosskd import (
    CrossKDATSS,
    CrossKDDistiller,
    CrossKDFCOS,
    CrossKDGeneralizedRCNN,
    CrossKDGFL,
    CrossKDRetinaNet,
)
from labelenc import (
    LabelEncATSS,
    LabelEncDetector,
    LabelEncFCOS,
    LabelEncGeneralizedRCNN,
    LabelEncGFL,
    LabelEncRetinaNet,
)


class LabelEncCrossKDDetector(LabelEncDetector, CrossKDDistiller):
    """Step 2 of LabelEnc in which the detector also learns from a teacher by CrossKD: both methods
    act on the same image features, in one iteration. Neither paper has this.

    Put it before the meta-architectures of LabelEnc and of CrossKD in a list of base classes. The
    detection losses are those that CrossKD's `training_losses` returns. Step 1 is LabelEnc's own,
    with the same head.
    """

    @configurable
    def __init__(self, **detector):
        """
        Args:
            detector: the arguments of both meta-architectures.

        Raises:
            ValueError: they are of step 1.
        """
        super().__init__(**detector)
        if self.step == 1:
            raise ValueError(
                f"MODEL.LABELENC.STEP is 1, but {type(self).__name__} trains step 2. Step 1 "
                "has LabelEnc's own meta-architecture of this detector"
            )

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
