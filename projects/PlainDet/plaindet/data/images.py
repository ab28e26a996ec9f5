"""Checks of image files, and what reading them would make of those that Detectron2 misreads."""

from __future__ import annotations

from PIL import ExifTags, Image

from plaindet.messages import some_of

# Detectron2 converts images by PIL, which cuts the values of these modes off at 255: they become
# all white or all black.
UNREADABLE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
# Values of the EXIF orientation by which the sides change places.
TRANSPOSED = (5, 6, 7, 8)


def check_file_mode(file: str) -> None:
    """Checks the pixels of an image file, without decoding them.

    Args:
        file: of an image; one that only Detectron2's PathManager knows (with `://`) is passed over.

    Raises:
        ValueError: its pixels have more than 8 bits.
    """
    if "://" not in file:
        with Image.open(file) as image:
            _check_mode(image)


def _check_mode(image: Image.Image) -> None:
    if image.mode in UNREADABLE_MODES:
        raise ValueError(
            f"grey pixels of more than 8 bits (mode {image.mode}), which would be read as white or "
            "black: convert the image to 8 bits, scaled by its range"
        )


def check_image_headers(records: list[dict], name: str) -> None:
    """Opens every image file without decoding it, and compares its size, after its EXIF
    orientation, with the record's. Records without a size get the file's.

    Files that only Detectron2's PathManager knows (with `://`) are passed over.

    Args:
        records: of a data set, in Detectron2's format.
        name: of the data set, for messages.

    Raises:
        ValueError: names the files, their sizes or modes.
    """
    problems = []
    for record in records:
        file = record.get("file_name")
        if file is None or "://" in file:
            continue
        try:
            with Image.open(file) as image:
                _check_mode(image)
                width, height = _oriented_size(image)
        except Exception as error:  # whatever is in the file
            problems.append(f"{file}: {type(error).__name__}: {error}")
            continue
        expected = (record.setdefault("width", width), record.setdefault("height", height))
        if expected != (width, height):
            problems.append(
                f"{file} is {width} x {height} (width x height, after its EXIF orientation), but "
                f"{expected[0]} x {expected[1]} by its annotations"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(records)} images of {name} cannot be used: "
            f"{some_of(problems)}. DATASETS.CHECK_IMAGES False leaves this check out"
        )


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    # In a PNG it may come behind the pixels, which PIL decodes to look for it.
    if image.format == "PNG" and "exif" not in image.info:
        return width, height
    is_transposed = image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSED
    return (height, width) if is_transposed else (width, height)
