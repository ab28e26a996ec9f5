# Detectron2's projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py. It needs timm and, to cut
# the polygons of masks, shapely.
from functools import partial

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.model_zoo import get_config
from detectron2.modeling import get_vit_lr_decay_rate

from plaindet.engine import detector_lr_factor

from .common import multi_step

model = get_config("common/models/mask_rcnn_vitdet.py").model

# Large-scale jitter.
size = 1024
dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=size, target_width=size),
    L(T.FixedSizeCrop)(crop_size=(size, size), pad=False),
]
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=size, max_size=size)
]

train = get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.max_iter = 184375  # 100 epochs
train.output_dir = "output/lazy_mask_rcnn_ViT_B_100ep"
lr_multiplier = multi_step([163889, 177546], train.max_iter, 250, 0.001)

optimizer = get_config("common/optim.py").AdamW
# Detectron2's function knows the names of a detector, and not those of a task.
optimizer.params.lr_factor_func = partial(
    detector_lr_factor,
    factor=partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7),
)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
