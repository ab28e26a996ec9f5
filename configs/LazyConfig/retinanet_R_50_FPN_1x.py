from detectron2.model_zoo import get_config

from .common import dataloader, lr_multiplier, optimizer, train

model = get_config("common/models/retinanet.py").model
model.backbone.bottom_up.freeze_at = 2
model.test_nms_thresh = 0.4  # as in the LabelEnc paper's code

train.output_dir = "output/lazy_retinanet_R_50_FPN_1x"
