"""The config keys of CrossKD."""

from detectron2.config import CfgNode


def add_crosskd_config(cfg: CfgNode) -> None:
    """Adds the keys of CrossKD, `MODEL.CROSSKD.*`, to a Detectron2 config."""
    if "CROSSKD" in cfg.MODEL:
        return
    cfg.MODEL.CROSSKD = CfgNode()
    # The teacher: its config file (Detectron2's and plaindet's keys), its weights and overrides of
    # its config.
    cfg.MODEL.CROSSKD.TEACHER = CfgNode()
    cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = ""
    cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = ""
    cfg.MODEL.CROSSKD.TEACHER.OPTS = []
    # Where a default is None, it is that of the detector's family: of the constructors of
    # DenseCrossKD, TwoStageCrossKD and DETRCrossKD.
    # After which activation of the head's towers features change the head. 0: the FPN's features.
    # In Faster and Mask R-CNN: after which layer of the box head; 0: the pooled features.
    cfg.MODEL.CROSSKD.POSITION = None
    # "a" to "d" as in Fig. 1 of the supplement ("a" is CrossKD), or "mimicking": the student's own
    # predictions imitate the teacher's. Faster and Mask R-CNN have "a" and "mimicking".
    cfg.MODEL.CROSSKD.STRATEGY = "a"
    # Classification: "qfl", the quality focal loss with CLS_GAMMA (Eq. 3), or "bce" (Table 1).
    # Faster and Mask R-CNN, whose classes and background are one distribution, have "kl" (Eq. 2)
    # with CLS_TEMPERATURE, or "qfl" of the probabilities.
    cfg.MODEL.CROSSKD.CLS_LOSS = None
    cfg.MODEL.CROSSKD.CLS_GAMMA = 1.0
    cfg.MODEL.CROSSKD.CLS_TEMPERATURE = 1.0
    cfg.MODEL.CROSSKD.CLS_WEIGHT = None
    # Where the classification is distilled: "all", or the "positive" or "negative" positions of the
    # student's assignment (Table 1).
    cfg.MODEL.CROSSKD.CLS_REGION = "all"
    # Boxes: "giou", "iou" or "l1" of decoded boxes; "kl" of GFL's distributions (Eq. 2), with
    # BOX_TEMPERATURE. In Faster and Mask R-CNN "l1" is of the box deltas, which are relative to the
    # size of the region.
    cfg.MODEL.CROSSKD.BOX_LOSS = None
    cfg.MODEL.CROSSKD.BOX_TEMPERATURE = 1.0
    cfg.MODEL.CROSSKD.BOX_WEIGHT = 1.0
    # Weight of the centerness loss, where the detector has a centerness. 0: none.
    cfg.MODEL.CROSSKD.CENTERNESS_WEIGHT = 0.0
    # Weight of the feature loss of PKD on the FPN's levels. 0: none.
    cfg.MODEL.CROSSKD.FEATURE_WEIGHT = 0.0
    # Deformable DETR: whose queries and references go into the teacher's decoder layers, "teacher"
    # or "student".
    cfg.MODEL.CROSSKD.QUERIES = "teacher"
