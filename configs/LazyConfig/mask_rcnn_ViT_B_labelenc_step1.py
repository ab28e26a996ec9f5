# Not in the paper. A third of the iterations more, without L3; then the schedule of 100 epochs.
from detectron2.config import LazyCall as L

from labelenc import LabelEnc, LabelMaps
from plaindet.data import PlainDatasetMapper
from plaindet.engine import TrainingTask

from .common import multi_step
from .mask_rcnn_ViT_B_100ep import dataloader, model, optimizer, train

model = L(TrainingTask)(
    detector=model,
    methods=[L(LabelEnc)(step=1, warmup_iters=61450, label_map="masks", norm="LN")],
)

dataloader.train.mapper._target_ = PlainDatasetMapper
dataloader.train.mapper.additions = [L(LabelMaps)(use_masks=True, augment=True)]

train.max_iter = 245825
train.output_dir = "output/lazy_mask_rcnn_ViT_B_labelenc_step1"
lr_multiplier = multi_step([225339, 238996], train.max_iter, 250, 0.001)
