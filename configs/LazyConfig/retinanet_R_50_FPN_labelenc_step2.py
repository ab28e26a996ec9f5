# The 1x schedule, the last 10,000 iterations without the auxiliary loss.
from detectron2.config import LazyCall as L

from labelenc import LabelEnc, LabelMaps
from plaindet.data import PlainDatasetMapper
from plaindet.engine import TrainingTask

from .retinanet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model = L(TrainingTask)(
    detector=model,
    methods=[
        L(LabelEnc)(
            step=2,
            cutoff_iters=10000,
            step1_file="output/lazy_retinanet_R_50_FPN_labelenc_step1/label_encoder.pth",
        )
    ],
)

dataloader.train.mapper._target_ = PlainDatasetMapper
dataloader.train.mapper.additions = [L(LabelMaps)()]

train.output_dir = "output/lazy_retinanet_R_50_FPN_labelenc_step2"
