from .coco_format import find_coco_folder, register_coco_format
from .mapper import PlainDatasetMapper
from .reading import explained_errors
from .records import check_records
from .shapes import register_shapes
from .stream import TrainStream, build_train_stream
