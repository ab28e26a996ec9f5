# Detectron2's projects/ViTDet/configs/COCO/mask_rcnn_vitdet_l_100ep.py.
from functools import partial

from detectron2.modeling import get_vit_lr_decay_rate

from .mask_rcnn_ViT_B_100ep import dataloader, lr_multiplier, model, optimizer, train

_vit = model.backbone.net
_vit.embed_dim, _vit.depth, _vit.num_heads, _vit.drop_path_rate = 1024, 24, 16, 0.4
_vit.window_block_indexes = [i for i in range(24) if i not in (5, 11, 17, 23)]

train.init_checkpoint = train.init_checkpoint.replace("vit_base", "vit_large")
train.output_dir = "output/lazy_mask_rcnn_ViT_L_100ep"

optimizer.params.lr_factor_func.keywords["factor"] = partial(
    get_vit_lr_decay_rate, num_layers=24, lr_decay_rate=0.8
)
