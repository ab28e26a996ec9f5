# With the losses of the boxes and the RoI pooling of the LabelEnc paper's baselines.
from detectron2.model_zoo import get_config

from .common import dataloader, lr_multiplier, optimizer, train

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator.smooth_l1_beta = 0.1111
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model.roi_heads.box_pooler.pooler_type = "ROIAlign"
model.roi_heads.box_pooler.sampling_ratio = 2
model.roi_heads.box_predictor.smooth_l1_beta = 1.0

optimizer.lr = 0.02
train.output_dir = "output/lazy_faster_rcnn_R_50_FPN_1x"
