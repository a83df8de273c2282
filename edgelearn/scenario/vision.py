"""Networks and data sets for images that torchvision has; the extra `vision`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgelearn.errors import DatasetError, DatasetMissingError, ExtraMissingError
from edgelearn.scenario.datasets import Dataset

if TYPE_CHECKING:
    from edgelearn.scenario.spec import DataSpec

_TEST_SHARE = 5  # every fifth image of a class, where a folder has no test images
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
_PARTS = ("train", "test", "val")
_SIZE = 32
_Y = NDArray[np.int64]


def mobilenet_v2(
    *, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0, dropout: float = 0.2
) -> nn.Module:
    """MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381), as torchvision builds it.

    The first convolution takes as many channels as the images have; strides stay, so that images
    are 32 times as small at the end.

    Args:
        input_shape: Images [C, H, W].
        num_classes: Number of labels.
        width: Multiplier of the channels of all layers, above 0.
        dropout: Share of features that is dropped before the classifier while training.

    Raises:
        ValueError: If samples are no images, or an argument is out of range.
        ExtraMissingError: If torchvision is not installed.
    """
    if len(input_shape) != 3:
        raise ValueError(f"mobilenet_v2 needs images [C, H, W], samples are {input_shape}")
    if not width > 0:
        raise ValueError(f"width is {width}; above 0 is allowed")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; 0 to less than 1 is allowed")
    models = _torchvision("models", "mobilenet_v2")
    network: nn.Module = models.mobilenet_v2(
        num_classes=num_classes, width_mult=width, dropout=dropout
    )
    stem = network.get_submodule("features.0")
    assert isinstance(stem, nn.Sequential)
    first = stem[0]
    assert isinstance(first, nn.Conv2d)
    if input_shape[0] != first.in_channels:
        new = nn.Conv2d(input_shape[0], first.out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out")  # as torchvision does
        stem[0] = new
    return network


def cifar_10(spec: DataSpec) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, by torchvision.

    It is looked for in `[data] root`, `data` and `~/.cache/edgelearn`, where torchvision unpacks it
    (`cifar-10-batches-py`), and fetched with `[data] download`.
    """
    make = _torchvision("datasets", "cifar-10").CIFAR10
    folders = [Path(spec.root).expanduser()] if spec.root else []
    folders += [Path("data"), Path.home() / ".cache" / "edgelearn"]
    found = next((f for f in folders if (f / "cifar-10-batches-py").is_dir()), None)
    if found is None and not spec.download:
        looked = "\n  ".join(str(folder / "cifar-10-batches-py") for folder in folders)
        raise DatasetMissingError(
            f"cifar-10 is nowhere on this machine; looked for\n  {looked}",
            remedy="put it there as torchvision unpacks it",
            is_fetched=True,
        )
    root = found or folders[0]
    try:
        parts = [make(root, train=is_train, download=spec.download) for is_train in (True, False)]
    except Exception as error:  # torchvision's own: damaged files, no network
        raise DatasetError(f"cifar-10 in {root}: {error}") from error
    arrays = [
        (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.array(part.targets, np.int64))
        for part in parts
    ]
    return Dataset("cifar-10", *arrays[0], *arrays[1], 10, scale=1 / 255, mean=0.473, std=0.251)


def image_folder(spec: DataSpec) -> Dataset:
    """Any folder of images, one folder for each class: `[data] root`, as torchvision has it.

    Either ROOT/train/CLASS/* and ROOT/test/CLASS/* (or `val`), or ROOT/CLASS/*, of which every
    fifth image of a class is a test image. Images become RGB of 32x32, the shorter side scaled and
    the middle cut out.

    Raises:
        DatasetError: If there is no such folder, a class has no images, train and test differ in
            their classes, or an image can't be read.
    """
    if not spec.root:
        raise DatasetMissingError("image-folder: no folder is named; it has one subfolder a class")
    root = Path(spec.root).expanduser()
    if not root.is_dir():
        raise DatasetMissingError(f"image-folder: {root} is not a folder")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test is not None:
        classes, x_train, y_train = _read(root / "train")
        others, x_test, y_test = _read(test)
        if classes != others:
            odd = sorted(set(classes).symmetric_difference(others))[0]
            raise DatasetError(f"{root}: the class {odd!r} is in one of train and {test.name} only")
    elif lone := [name for name in _PARTS if _has_folders(root / name)]:  # no class: it has some
        raise DatasetError(
            f"{root}: there is {lone[0]}/, but not both train/ and one of test/ and val/"
        )
    else:
        classes, x, y = _read(root)
        rank = np.empty(len(y), np.int64)  # of an image among those of its class
        for label in range(len(classes)):
            rank[y == label] = np.arange(np.count_nonzero(y == label))
        last = rank % _TEST_SHARE == _TEST_SHARE - 1
        x_train, y_train, x_test, y_test = x[~last], y[~last], x[last], y[last]
        if few := sorted(set(range(len(classes))) - set(y_test.tolist())):
            raise DatasetError(
                f"{root}: {classes[few[0]]!r} has fewer than {_TEST_SHARE} images, so none to test "
                "with; or put train/ and test/ there"
            )
    mean, std = float(x_train.mean() / 255), float(x_train.std() / 255)
    return Dataset(
        root.name, x_train, y_train, x_test, y_test, len(classes),
        scale=1 / 255, mean=mean, std=std or 1.0,
    )  # fmt: skip


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _read(folder: Path) -> tuple[list[str], NDArray[np.uint8], _Y]:
    """Return the classes, and the images and labels of a folder: each class's first, second, ...

    So the first ones, which `max_train` and `max_test` keep, are of all classes.
    """
    load = _reader()
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DatasetError(f"{folder}: {len(classes)} class folder(s); at least 2 are expected")
    images, labels, ranks = [], [], list[int]()
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise DatasetError(f"{folder / name}: no images ({', '.join(_SUFFIXES)})")
        images += [load(path) for path in paths]
        labels += [label] * len(paths)
        ranks += range(len(paths))
    order = np.argsort(np.array(ranks), kind="stable")  # the classes take turns
    return classes, np.stack(images)[order], np.array(labels, np.int64)[order]


def _reader() -> Callable[[Path], NDArray[np.uint8]]:
    """Return what reads an image as [3, 32, 32]."""
    try:
        image = importlib.import_module("PIL.Image")
        ops = importlib.import_module("PIL.ImageOps")
    except ImportError:
        raise ExtraMissingError(
            package="pillow", extra="vision", needed_for="image-folder"
        ) from None

    def load(path: Path) -> NDArray[np.uint8]:
        try:
            with image.open(path) as opened:
                fitted = ops.fit(opened.convert("RGB"), (_SIZE, _SIZE))
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
            raise DatasetError(f"{path}: not an image, or damaged: {error}") from error
        return np.ascontiguousarray(np.asarray(fitted, np.uint8).transpose(2, 0, 1))

    return load


def _torchvision(part: str, needed_for: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ImportError:
        raise ExtraMissingError(
            package="torchvision", extra="vision", needed_for=needed_for
        ) from None
