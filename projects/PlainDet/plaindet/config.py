from detectron2.config import CfgNode


def add_plaindet_config(cfg: CfgNode) -> None:
    """Adds the keys of plaindet to a Detectron2 config."""
    if "COCO_FORMAT" in cfg.DATASETS:
        return
    # Data sets in COCO format to register, each [name, json file, folder of images]. The names can
    # then be used in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_FORMAT = []
