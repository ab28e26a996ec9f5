"""``shapes``: a small synthetic detection set, drawn on the fly and never stored.

``shapes_train`` (2000 images) and ``shapes_val`` (200 images) show geometric shapes of eight
classes that vary in size, colour, rotation and texture, hide each other and lie on cluttered
ground. Everything follows from (split, index) alone: a list of dataset dicts needs no file, and
an image is drawn when Detectron2 opens its ``shapes://train/17.bmp`` through its own
``PathManager``. Data mappers, visualizers and ``COCOEvaluator`` therefore work unmodified.

Every process and platform has to get the same set. So random numbers come from
``RandomState.random_sample`` and ``bytes`` only (NumPy keeps their streams; it does not keep
those of ``Generator``), and shapes are fixed-point polygons without anti-aliasing.
"""

import io
import math
import re

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager

__all__ = ["IMAGE_SIZE", "SHAPES_CLASSES", "SHAPES_SPLITS", "draw_shapes", "register_shapes"]

IMAGE_SIZE = 160  # pixels, height and width
SHAPES_SPLITS = {"train": 2000, "val": 200}  # split -> number of images

MAX_OBJECTS = 14
MIN_DIAMETER, MAX_DIAMETER = 20, 70  # pixels, of the circle around an object
# An object of which less than this would be seen is not in the image at all: a shape that is
# visible but has no annotation would be wrong ground truth.
MIN_VISIBLE_FRACTION = 0.4
MIN_VISIBLE_PIXELS = 40

MAX_TILT = 0.07  # turns, to both sides of upright

# As with real things, most objects of a class have a similar colour, so that a small detector
# learns within minutes; the others have any colour, so that the shape has to be learned too.
_CLASS_COLORS = {
    "disc": (205, 65, 55),
    "ring": (60, 100, 210),
    "triangle": (225, 200, 60),
    "square": (60, 160, 80),
    "star": (230, 130, 40),
    "cross": (150, 70, 180),
    "arrow": (60, 190, 200),
    "half_disc": (200, 90, 140),
}
_TYPICAL_COLOR = 0.9  # share of the objects with the colour of their class
_CLASS_COLOR_SPREAD = 35

# Distance of a colour to what surrounds it, of 255: clear for most, low for one in five.
_CLEAR_CONTRAST, _LOW_CONTRAST = (50, 128), (20, 60)
_OBJECT_TEXTURE_CONTRAST, _GROUND_TEXTURE_CONTRAST = (5, 40), (5, 40)
_PREFIX = "shapes://"  # of the file names
_STEPS = np.arange(256)[:, None]
_SUBPIXEL_BITS = 4  # cv2 polygons in 1/16 pixel
_MARGIN = MAX_DIAMETER // 4  # pixels around the image, for what the border cuts off
_OBJECT_TEXTURES = ("solid", "solid", "stripes", "checks", "noise", "gradient")
# No checks: one cell of a large check pattern is a square.
_GROUND_TEXTURES = ("gradient", "clouds", "clouds", "stripes", "noise")


def _arc(start, stop, points, radius=1.0):
    """Points of a circle around the origin, from start to stop (turns), both included."""
    angles = 2 * math.pi * np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygons():
    """Class name -> polygons (K, 2), xy in units of the object's radius, even-odd filled.

    y points down. Each is its own mirror image, so a flipped image is one that could be drawn.
    """
    star = _arc(-0.25, 0.65, 10)
    star[1::2] *= 0.42
    a = 0.3  # half an arm of the cross; its corners lie on the unit circle
    b = math.sqrt(1 - a * a)
    cross = [(b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a)]
    cross += [(-x, -y) for x, y in cross]
    arrow = [(0, -1), (0.8, 0), (0.28, 0), (0.28, 0.95)]
    arrow += [(-x, y) for x, y in arrow[:0:-1]]
    return {
        "disc": [_arc(0, 1, 49)],
        "ring": [_arc(0, 1, 49), _arc(0, 1, 49, radius=0.55)],
        "triangle": [_arc(-0.25, 5 / 12, 3)],
        "square": [_arc(0.125, 0.875, 4)],
        "star": [star],
        "cross": [np.array(cross)],
        "arrow": [np.array(arrow)],
        "half_disc": [_arc(0.5, 1, 25) + (0, 0.4)],
    }


_POLYGONS = _polygons()
SHAPES_CLASSES = tuple(_POLYGONS)


def _integer(rs, low, high):
    """A random int in [low, high). ``randint`` would depend on the platform's int, and is slow."""
    return low + int(rs.random_sample() * (high - low))


def _direction(rs, limit):
    """(cos, sin) of a random angle in [-limit, limit] turns."""
    angle = 2 * math.pi * limit * (2 * rs.random_sample() - 1)
    return math.cos(angle), math.sin(angle)


def _random_state(split, index):
    if split not in SHAPES_SPLITS or index < 0:
        raise ValueError(
            f"No image {index!r} of split {split!r}: expected a number from 0 and one of "
            f"{list(SHAPES_SPLITS)}"
        )
    # The factor (odd, so no two numbers meet) moves seeds of neighbouring images far apart.
    number = len(SHAPES_SPLITS) * index + list(SHAPES_SPLITS).index(split)
    return np.random.RandomState(2654435761 * number % (1 << 32))


def _draw_object(rs, category):
    """One object at a random place, whole: (H, W) uint8 mask inside the image, area of all of it.

    The area also counts what lies outside the image.
    """
    u = rs.random_sample()
    radius = (MIN_DIAMETER + (MAX_DIAMETER - MIN_DIAMETER) * u * u) / 2  # small ones more often
    cos, sin = _direction(rs, MAX_TILT)
    # The border may cut an object, but not so much that a disc would look like a half disc.
    center = 0.75 * radius + (IMAGE_SIZE - 1.5 * radius) * rs.random_sample(2) + _MARGIN
    # 0.5: a pixel's centre has integer coordinates in cv2, its edges have them here.
    to_pixels = radius * np.array([[cos, sin], [-sin, cos]])
    points = [p @ to_pixels + (center - 0.5) for p in _POLYGONS[SHAPES_CLASSES[category]]]
    points = [np.rint(p * (1 << _SUBPIXEL_BITS)).astype(np.int32) for p in points]
    canvas = np.zeros((IMAGE_SIZE + 2 * _MARGIN,) * 2, np.uint8)
    cv2.fillPoly(canvas, points, 1, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    return canvas[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], cv2.countNonZero(canvas)


def _layout(rs):
    """The annotations of an image, before any pixel is painted.

    Objects are placed from the topmost one down, so what is seen of each is final at once.

    Returns:
        classes (list[int]): topmost object first; never empty.
        masks (ndarray): (N, H, W) bool, what is seen of each object.
    """
    free = np.ones((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    classes, masks = [], []
    trials = _integer(rs, 1, MAX_OBJECTS + 1)
    while trials > 0 or not classes:
        trials -= 1
        category = _integer(rs, 0, len(SHAPES_CLASSES))
        mask, area = _draw_object(rs, category)
        visible = mask & free
        if cv2.countNonZero(visible) >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * area):
            free &= 1 - mask
            classes.append(category)
            masks.append(visible)
    return classes, np.stack(masks).astype(bool)


def _texture(rs, kind, height, width):
    """(height, width) uint8: how much of its second colour a surface shows at each pixel."""
    if kind == "solid":
        return np.zeros((height, width), np.uint8)
    if kind in ("noise", "clouds"):
        cell = _integer(rs, 1, 4) if kind == "noise" else _integer(rs, 16, 60)
        rows, columns = height // cell + 2, width // cell + 2
        cells = np.frombuffer(rs.bytes(rows * columns), np.uint8).reshape(rows, columns)
        size = (columns * cell, rows * cell)
        # The one interpolation of cv2 that gives the same bits everywhere.
        how = cv2.INTER_NEAREST if kind == "noise" else cv2.INTER_LINEAR_EXACT
        return cv2.resize(cells, size, interpolation=how)[:height, :width]
    c, s = (round(64 * v) for v in _direction(rs, 0.5))
    x, y = np.arange(width, dtype=np.int16), np.arange(height, dtype=np.int16)[:, None]
    along = (c * x + s * y) >> 6  # pixels
    if kind == "gradient":
        along -= along.min()
        return (along * (255 // max(1, along.max()))).astype(np.uint8)
    period = _integer(rs, 2, 7)
    cells = along // period
    if kind == "checks":
        cells += ((c * y - s * x) >> 6) // period
    return ((cells & 1) * 255).astype(np.uint8)


def _shifted(rs, color, low, high):
    """A colour, three ints, low to high (at most 128) away from ``color`` in each channel."""
    shifted = []
    for value in color:
        shift = _integer(rs, low, high)
        if rs.random_sample() < 0.5:
            shift = -shift
        # Turned round where it would leave 0..255: clipping would make it smaller.
        shifted.append(int(value + shift if 0 <= value + shift <= 255 else value - shift))
    return shifted


def _contrasting(rs, color):
    """A colour to be seen on ``color``."""
    low = rs.random_sample() < 0.2
    return _shifted(rs, color, *(_LOW_CONTRAST if low else _CLEAR_CONTRAST))


def _surface(rs, kinds, height, width, first, second):
    """(height, width, 3) uint8: a surface of two colours, in one of the kinds of texture."""
    ramp = (first + (np.subtract(second, first) * _STEPS >> 8)).astype(np.uint8)
    return ramp.take(_texture(rs, kinds[_integer(rs, 0, len(kinds))], height, width), axis=0)


def _paint_ground(rs):
    """(H, W, 3) uint8: a background with lines, arcs and dots, none like an object of a class."""
    gray = _integer(rs, 60, 196)
    base = [gray + _integer(rs, -20, 21) for _ in range(3)]
    second = _shifted(rs, base, *_GROUND_TEXTURE_CONTRAST)
    image = _surface(rs, _GROUND_TEXTURES, IMAGE_SIZE, IMAGE_SIZE, base, second)
    for _ in range(_integer(rs, 0, 12)):
        color = _contrasting(rs, base)
        x, y = _integer(rs, 0, IMAGE_SIZE), _integer(rs, 0, IMAGE_SIZE)
        kind = _integer(rs, 0, 4)
        if kind == 0:
            end = (x + _integer(rs, -50, 51), y + _integer(rs, -50, 51))
            cv2.line(image, (x, y), end, color, _integer(rs, 1, 4))
        elif kind == 1:
            axes = (_integer(rs, 8, 35), _integer(rs, 8, 35))
            start = _integer(rs, 0, 360)
            stop = start + _integer(rs, 40, 180)
            cv2.ellipse(image, (x, y), axes, 0, start, stop, color, _integer(rs, 1, 4))
        else:
            cv2.circle(image, (x, y), _integer(rs, 1, 4), color, -1)
    return image


def _object_color(rs, category, around):
    """The colour of an object on ground of the colour ``around``."""
    if rs.random_sample() >= _TYPICAL_COLOR:
        return _contrasting(rs, around)
    return _shifted(rs, _CLASS_COLORS[SHAPES_CLASSES[category]], 0, _CLASS_COLOR_SPREAD)


def _paint(rs, classes, masks):
    """(H, W, 3) uint8 RGB: the image of a layout."""
    image = _paint_ground(rs)
    # The lowest first, so that the others see what they lie on.
    for category, mask in zip(classes[::-1], masks[::-1]):
        x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
        box = (slice(max(0, y - 3), y + h + 3), slice(max(0, x - 3), x + w + 3))
        mask = mask[box]
        around = cv2.mean(image[box], (~mask).view(np.uint8))[:3]
        first = _object_color(rs, category, around)
        second = _shifted(rs, first, *_OBJECT_TEXTURE_CONTRAST)
        fill = _surface(rs, _OBJECT_TEXTURES, *mask.shape, first, second)
        np.copyto(image[box], fill, where=mask[..., None])
    noise = np.frombuffer(rs.bytes(image.size), np.uint8).reshape(image.shape)
    return cv2.add(image, noise >> _integer(rs, 3, 7))


def draw_shapes(split, index):
    """Draw one image and its exact annotations.

    Args:
        split (str): "train" or "val".
        index (int): any number from 0; the registered sets use those below SHAPES_SPLITS[split].

    Returns:
        image (ndarray): (H, W, 3) uint8, RGB, H = W = IMAGE_SIZE.
        classes (list[int]): N >= 1 indices into SHAPES_CLASSES, topmost object first.
        masks (ndarray): (N, H, W) bool, the visible pixels of each object; they are disjoint.
    """
    rs = _random_state(split, index)
    classes, masks = _layout(rs)
    return _paint(rs, classes, masks), classes, masks


def _annotation(category, mask):
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {
        "bbox": [float(x), float(y), float(x + w), float(y + h)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": 0,
        # Text instead of bytes: the dicts can be written as json.
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
    }


def _dataset_dict(split, index):
    # The layout comes first in the random stream, so annotations cost no painting.
    classes, masks = _layout(_random_state(split, index))
    return {
        "file_name": f"{_PREFIX}{split}/{index}.bmp",
        "image_id": index,
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "annotations": [_annotation(c, m) for c, m in zip(classes, masks)],
    }


class ShapesPathHandler(PathHandler):
    """Draws ``shapes://<split>/<index>.bmp`` when it is opened for reading."""

    def _get_supported_prefixes(self):
        return [_PREFIX]

    def _parse(self, path):
        found = re.fullmatch(_PREFIX + r"(\w+)/(0|[1-9][0-9]{0,8})\.bmp", path)
        if found and int(found[2]) < SHAPES_SPLITS.get(found[1], 0):
            return found[1], int(found[2])
        expected = " or ".join(f"{_PREFIX}{s}/<0..{n - 1}>.bmp" for s, n in SHAPES_SPLITS.items())
        raise FileNotFoundError(f"No such image of the shapes set: {path!r}; expected {expected}")

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        self._check_kwargs(kwargs)
        if mode != "rb":
            raise ValueError(f"{path} can only be opened with mode 'rb', not {mode!r}")
        image, _, _ = draw_shapes(*self._parse(path))
        _, data = cv2.imencode(".bmp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        return io.BytesIO(data.tobytes())


def register_shapes():
    """Register ``shapes_train`` and ``shapes_val`` with Detectron2; harmless when repeated.

    Their dataset dicts have boxes in XYXY_ABS, absolute pixels: the edges of the visible pixels,
    so x1 and y1 are one more than the last column and row. Masks are COCO RLE of the visible
    pixels: a model with masks needs INPUT.MASK_FORMAT "bitmask".
    """
    PathManager.register_handler(ShapesPathHandler())
    for split, size in SHAPES_SPLITS.items():
        name = f"shapes_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(
                name, lambda s=split, n=size: [_dataset_dict(s, i) for i in range(n)]
            )
        MetadataCatalog.get(name).set(thing_classes=list(SHAPES_CLASSES), evaluator_type="coco")
