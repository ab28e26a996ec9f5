from .coco_format import find_coco_folder, register_coco_format
from .gate import validate_datasets, validated_records
from .mapper import PlainDatasetMapper
from .records import check_records
from .shapes import register_shapes
from .stream import TrainStream, build_train_stream
