from .coco_format import find_coco_folder, register_coco_format
from .mapper import PlainDatasetMapper
from .shapes import register_shapes
from .stream import TrainStream, build_train_stream
