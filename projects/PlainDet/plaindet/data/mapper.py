"""From a record of a data set to the input of a detector."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from .images import check_file_mode


class PlainDatasetMapper(DatasetMapper):
    """Detectron2's mapper, whose errors name the image, with DETR's crop as an option."""

    @configurable
    def __init__(
        self, is_train: bool = True, *, additions: Sequence[Callable[[dict], None]] = (), **kwargs
    ):
        """
        Args:
            additions: what training methods add to a sample, once all else has been done to it.
            is_train, kwargs: as for :class:`detectron2.data.DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.additions = additions

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        arguments = super().from_config(cfg, is_train)
        crop = cfg.INPUT.CROP
        crops_polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon" and crop.ENABLED
        if is_train and crops_polygons and find_spec("shapely") is None:
            raise ModuleNotFoundError(
                "INPUT.CROP of masks that are polygons needs shapely, which is not installed: "
                "`pip install shapely`, or set INPUT.MASK_FORMAT bitmask"
            )
        if is_train and crop.ENABLED and crop.RESIZE_BEFORE:
            augmentations = arguments["augmentations"]  # the crop is the first
            resize = T.ResizeShortestEdge(crop.RESIZE_BEFORE, sample_style="choice")
            augmentations[0] = T.RandomApply(T.AugmentationList([resize, augmentations[0]]))
        return arguments

    def __call__(self, dataset_dict):
        """As :class:`detectron2.data.DatasetMapper`.

        Raises:
            RuntimeError: the image cannot be read, is not of the size that the annotations say, or
                has bad annotations.
        """
        try:
            check_file_mode(dataset_dict["file_name"])
            sample = super().__call__(dataset_dict)
        except Exception as error:
            # Data loader workers re-raise an error by its type and message alone, so the message
            # has everything in it.
            raise RuntimeError(
                f"Cannot load {dataset_dict['file_name']} (image id "
                f"{dataset_dict.get('image_id')}): {type(error).__name__}: {error}"
            ) from error
        if self.is_train and "instances" in sample:
            for add in self.additions:
                add(sample)
        return sample
