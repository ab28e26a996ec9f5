"""The config keys of LabelEnc."""

from detectron2.config import CfgNode


def add_labelenc_config(cfg: CfgNode) -> None:
    """Adds the keys of LabelEnc, `MODEL.LABELENC.*`, to a Detectron2 config."""
    if "LABELENC" in cfg.MODEL:
        return
    cfg.MODEL.LABELENC = CfgNode()
    # 1: train the label encoding function (Eq. 9). 2: train the detector with it (Eq. 7).
    cfg.MODEL.LABELENC.STEP = 1
    # Step 2: the label_encoder.pth that a step-1 run writes into its OUTPUT_DIR.
    cfg.MODEL.LABELENC.STEP1_FILE = ""
    # Step 2: whether the head and the FPN start from step 1 ("initialization" in Table 5).
    cfg.MODEL.LABELENC.INHERIT = True
    # What the label map is drawn from: "boxes", or "masks" (needs MODEL.MASK_ON).
    cfg.MODEL.LABELENC.LABEL_MAP = "boxes"
    # Step 1: lambda_1 of Eq. 9, the weight of the detection loss L2. With LAMBDA1 and LAMBDA2 0,
    # the reconstruction loss L1 is all that is trained (Table 2), without the image branch.
    cfg.MODEL.LABELENC.LAMBDA1 = 1.0
    # Step 1: lambda_2 of Eq. 9, the weight of the distance L3.
    cfg.MODEL.LABELENC.LAMBDA2 = 1.0
    # Step 2: lambda of Eq. 7, the weight of the auxiliary loss ("supervision" in Table 5).
    cfg.MODEL.LABELENC.LAMBDA = 1.0
    # Step 1: the first iterations, which train without L3. They count towards SOLVER.MAX_ITER.
    cfg.MODEL.LABELENC.WARMUP_ITERS = 30000
    # Step 1, both steps in a single run: the iterations of step 1, after which the run goes on as
    # step 2 with the backbone, the head and the optimizer that it has. 0: step 1 to the end.
    cfg.MODEL.LABELENC.STEP1_ITERS = 0
    # Step 2: the last iterations, which train without the auxiliary loss.
    cfg.MODEL.LABELENC.CUTOFF_ITERS = 10000

    # Step 2 with a trained detector instead of the label encoder ("vanilla KD" in Table 6): its
    # config file (Detectron2's and plaindet's keys), its weights and overrides of its config. Its
    # features supervise, and the head and the FPN start from its own.
    cfg.MODEL.LABELENC.TEACHER = CfgNode()
    cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE = ""
    cfg.MODEL.LABELENC.TEACHER.WEIGHTS = ""
    cfg.MODEL.LABELENC.TEACHER.OPTS = []
