# 30,000 iterations without L3, then the 1x schedule.
from detectron2.config import LazyCall as L

from labelenc import LabelEnc, LabelMaps
from plaindet.data import PlainDatasetMapper
from plaindet.engine import TrainingTask

from .common import multi_step
from .retinanet_R_50_FPN_1x import dataloader, model, optimizer, train

model = L(TrainingTask)(detector=model, methods=[L(LabelEnc)(step=1, warmup_iters=30000)])

dataloader.train.mapper._target_ = PlainDatasetMapper
dataloader.train.mapper.additions = [L(LabelMaps)(augment=True)]

train.max_iter = 120000
train.output_dir = "output/lazy_retinanet_R_50_FPN_labelenc_step1"
lr_multiplier = multi_step([90000, 110000], train.max_iter)
