from detectron2.config import LazyCall as L

from crosskd import TwoStageCrossKD
from plaindet.engine import TrainingTask, load_teacher

from .mask_rcnn_ViT_B_100ep import dataloader, lr_multiplier, model, optimizer, train
from .mask_rcnn_ViT_L_100ep import model as _teacher
from .mask_rcnn_ViT_L_100ep import train as _training

model = L(TrainingTask)(
    detector=model,
    methods=[
        L(TwoStageCrossKD)(
            teacher=L(load_teacher)(
                model=_teacher, weights=f"{_training.output_dir}/model_final.pth"
            )
        )
    ],
)

train.output_dir = "output/lazy_mask_rcnn_ViT_B_crosskd_from_ViT_L"
