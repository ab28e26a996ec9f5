# Not in the paper. The schedule of 100 epochs, its last ninth without the auxiliary loss.
from detectron2.config import LazyCall as L

from labelenc import LabelEnc, LabelMaps
from plaindet.data import PlainDatasetMapper
from plaindet.engine import TrainingTask

from .mask_rcnn_ViT_B_100ep import dataloader, lr_multiplier, model, optimizer, train

model = L(TrainingTask)(
    detector=model,
    methods=[
        L(LabelEnc)(
            step=2,
            cutoff_iters=20486,
            label_map="masks",
            norm="LN",
            step1_file="output/lazy_mask_rcnn_ViT_B_labelenc_step1/label_encoder.pth",
        )
    ],
)

dataloader.train.mapper._target_ = PlainDatasetMapper
dataloader.train.mapper.additions = [L(LabelMaps)(use_masks=True)]

train.output_dir = "output/lazy_mask_rcnn_ViT_B_labelenc_step2"
