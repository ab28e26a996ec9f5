from detectron2.data import DatasetMapper


class PlainDatasetMapper(DatasetMapper):
    """Detectron2's mapper, whose errors name the image."""

    def __call__(self, dataset_dict):
        """As :class:`detectron2.data.DatasetMapper`.

        Raises:
            RuntimeError: the image cannot be read, is not of the size that the annotations say, or
                has bad annotations.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            # Data loader workers re-raise an error by its type and message alone, so the message
            # has everything in it.
            raise RuntimeError(
                f"Cannot load {dataset_dict['file_name']} (image id "
                f"{dataset_dict.get('image_id')}): {type(error).__name__}: {error}"
            ) from error
