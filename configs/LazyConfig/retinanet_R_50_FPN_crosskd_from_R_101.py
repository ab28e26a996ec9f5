from detectron2.config import LazyCall as L

from crosskd import DenseCrossKD
from plaindet.engine import TrainingTask, load_teacher

from .retinanet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train
from .retinanet_R_101_FPN_1x import model as _teacher
from .retinanet_R_101_FPN_1x import train as _training

model = L(TrainingTask)(
    detector=model,
    methods=[
        L(DenseCrossKD)(
            teacher=L(load_teacher)(
                model=_teacher, weights=f"{_training.output_dir}/model_final.pth"
            )
        )
    ],
)

train.output_dir = "output/lazy_retinanet_R_50_FPN_crosskd_from_R_101"
