"""Real data sets: digits ships in the package; IDX files are read from wherever they lie.

A data set plug-in is a function of `DataSpec` that returns a `Dataset`.
"""

from __future__ import annotations

import gzip
import importlib
import math
import struct
import zlib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelearn import plugins
from edgelearn.errors import DatasetError, DatasetMissingError, ExtraMissingError

if TYPE_CHECKING:
    from edgelearn.scenario.spec import DataSpec


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples in memory, as compact as a device would store them.

    Attributes:
        name: Short name.
        x_train: [N, C, H, W] or [N, F], uint8 (or another compact dtype).
        y_train: [N], int64, labels 0..num_classes-1.
        x_test: [M, ...], the same dtype.
        y_test: [M], int64.
        num_classes: Number of labels.
        scale: Factor that brings stored numbers to about [0, 1].
        mean: Mean after scaling.
        std: Standard deviation after scaling.
        users_train: Natural user of each sample [N], int64, where the data set knows it.
        users_test: The same for the test samples [M].
        experiences_train: Experience of each sample [N], int64, 0..T-1, where the data set brings
            its own: they follow each other in a stream of kind "given".
        experiences_test: The same for the test samples [M]; None where all experiences share them.
    """

    name: str
    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    num_classes: int
    scale: float
    mean: float = 0.0
    std: float = 1.0
    users_train: NDArray[np.int64] | None = None
    users_test: NDArray[np.int64] | None = None
    experiences_train: NDArray[np.int64] | None = None
    experiences_test: NDArray[np.int64] | None = None

    @property
    def num_experiences(self) -> int:
        """Experiences that the data set brings with it, T; 0 if it has none."""
        return 0 if self.experiences_train is None else int(self.experiences_train.max()) + 1

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_train.shape[1:])


def load_dataset(spec: DataSpec) -> Dataset:
    """Load the data set of a scenario, cut to `max_train` and `max_test`.

    These are the first samples; of a data set that brings its experiences, of each in proportion.

    Raises:
        DatasetError: If it is nowhere to be found or damaged.
        PluginError: If the name leads nowhere.
    """
    dataset = _checked(plugins.resolve(spec.dataset, plugins.DATASETS)(spec), spec.dataset)
    if spec.max_train:
        users, experiences = dataset.users_train, dataset.experiences_train
        kept = _first(
            spec.max_train, len(dataset.y_train), experiences, f"{spec.dataset}: training"
        )
        dataset = replace(
            dataset,
            x_train=dataset.x_train[kept],
            y_train=dataset.y_train[kept],
            users_train=users[kept] if users is not None else None,
            experiences_train=experiences[kept] if experiences is not None else None,
        )
    if spec.max_test:
        users, experiences = dataset.users_test, dataset.experiences_test
        kept = _first(spec.max_test, len(dataset.y_test), experiences, f"{spec.dataset}: test")
        dataset = replace(
            dataset,
            x_test=dataset.x_test[kept],
            y_test=dataset.y_test[kept],
            users_test=users[kept] if users is not None else None,
            experiences_test=experiences[kept] if experiences is not None else None,
        )
    return dataset


def _first(
    most: int, count: int, experiences: NDArray[np.int64] | None, source: str
) -> slice | NDArray[np.int64]:
    """Return which of `count` samples to keep: the first ones, of each experience in proportion."""
    if experiences is None or most >= count:
        return slice(most)
    sizes = np.bincount(experiences)
    if most < len(sizes):
        raise DatasetError(
            f"{source} samples cut to {most}, fewer than the {len(sizes)} experiences"
        )
    order = np.argsort(experiences, kind="stable")
    rank = np.empty(count)
    rank[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Each first one, then by how far a sample is in its experience.
    by_turn = np.lexsort((rank / sizes[experiences], rank > 0))
    return np.sort(by_turn[:most])


def _checked(dataset: Any, source: str) -> Dataset:
    """Check what a plug-in or a file gave, before a wrong label fails deep inside a run."""
    if not isinstance(dataset, Dataset):
        raise DatasetError(f"{source} returned {type(dataset).__name__}, expected a Dataset")
    for x, y, users, part in (
        (dataset.x_train, dataset.y_train, dataset.users_train, "training"),
        (dataset.x_test, dataset.y_test, dataset.users_test, "test"),
    ):
        if len(y) == 0 or len(x) != len(y):
            raise DatasetError(f"{source}: {len(x)} {part} samples but {len(y)} labels")
        if users is not None and len(users) != len(y):
            raise DatasetError(f"{source}: {len(users)} {part} users but {len(y)} labels")
        if y.dtype != np.int64 or y.min() < 0 or y.max() >= dataset.num_classes:
            raise DatasetError(
                f"{source}: {part} labels are {y.dtype} from {y.min()} to {y.max()}, "
                f"expected int64 from 0 to {dataset.num_classes - 1}"
            )
    if dataset.x_train.shape[1:] != dataset.x_test.shape[1:]:
        raise DatasetError(
            f"{source}: training samples are {dataset.x_train.shape[1:]}, "
            f"test samples {dataset.x_test.shape[1:]}"
        )
    _check_experiences(dataset, source)
    return dataset


def _check_experiences(dataset: Dataset, source: str) -> None:
    """Check a data set's own experiences: 0..T-1, none without training or test samples."""
    train, test = dataset.experiences_train, dataset.experiences_test
    if train is None:
        if test is not None:
            raise DatasetError(
                f"{source}: experiences of test samples, but none of training samples"
            )
        return
    for found, y, part in ((train, dataset.y_train, "training"), (test, dataset.y_test, "test")):
        if found is None:
            continue
        if len(found) != len(y) or found.dtype != np.int64:
            raise DatasetError(
                f"{source}: experiences of {part} samples are {len(found)} {found.dtype}, "
                f"expected {len(y)} int64"
            )
        have, wanted = set(np.unique(found).tolist()), set(range(dataset.num_experiences))
        if have != wanted:
            raise DatasetError(
                f"{source}: {part} samples are of the experiences {sorted(have)}; each of 0 to "
                f"{dataset.num_experiences - 1} needs some"
            )


def digits(_spec: DataSpec) -> Dataset:
    """Optical Recognition of Handwritten Digits: 1,797 images 8x8, 10 classes (UCI, CC BY 4.0).

    The copy that scikit-learn ships, in its order; every fifth image of a class is a test image.
    """
    with resources.files("edgelearn.scenario").joinpath("data/digits.npz").open("rb") as file:
        stored = np.load(file)
        x, y = stored["x"], stored["y"].astype(np.int64)
    by_class = np.argsort(y, kind="stable")
    rank = np.empty(len(y), np.int64)  # of an image among those of its class
    rank[by_class] = np.arange(len(y)) - np.searchsorted(y[by_class], y[by_class])
    test = rank % 5 == 4
    return Dataset("digits", x[~test], y[~test], x[test], y[test], 10, scale=1 / 16)


def fashion_mnist(spec: DataSpec) -> Dataset:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 60,000 + 10,000 of 28x28."""
    folders = [Path("/usr/share/datasets/fashion-mnist"), *_torchvision_folders("FashionMNIST")]
    hint = "on Debian: apt-get install dataset-fashion-mnist"
    stored = _idx(spec, "fashion-mnist", folders, hint, "FashionMNIST")
    return Dataset("fashion-mnist", *stored, 10, scale=1 / 255, mean=0.2860, std=0.3530)


def mnist(spec: DataSpec) -> Dataset:
    """MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 handwritten digits of 28x28."""
    folders = [Path("/usr/share/datasets/mnist"), *_torchvision_folders("MNIST")]
    stored = _idx(spec, "mnist", folders, "", "MNIST")
    return Dataset("mnist", *stored, 10, scale=1 / 255, mean=0.1307, std=0.3081)


def _torchvision_folders(name: str) -> list[Path]:
    roots = [Path("data"), Path.home() / ".cache" / "edgelearn", Path.home() / "data"]
    return [root / name / "raw" for root in roots]


_FILES = (
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)
Stored = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def _idx(
    spec: DataSpec, name: str, folders: list[Path], hint: str, torchvision_name: str
) -> Stored:
    if spec.root:
        root = Path(spec.root).expanduser()
        folders = [root, root / torchvision_name / "raw", root / "raw", *folders]
    for folder in folders:
        if all(_idx_path(folder, stem) for stem, _ in _FILES):
            return _read_all(folder)
    if spec.download:
        return _read_all(_download(torchvision_name))
    looked = "\n  ".join(str(folder) for folder in folders)
    raise DatasetMissingError(
        f"{name} is nowhere on this machine; looked for its four IDX files in\n  {looked}",
        remedy=hint,
        is_fetched=True,
    )


def _download(torchvision_name: str) -> Path:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError:
        raise ExtraMissingError(
            package="torchvision", extra="avalanche", needed_for=f"downloading {torchvision_name}"
        ) from None
    root = Path.home() / ".cache" / "edgelearn"
    try:
        getattr(datasets, torchvision_name)(root, download=True)
    except Exception as error:
        raise DatasetError(f"{torchvision_name} could not be downloaded: {error}") from error
    return root / torchvision_name / "raw"


def _idx_path(folder: Path, stem: str) -> Path | None:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    return None


def _read_all(folder: Path) -> Stored:
    arrays = []
    for stem, rank in _FILES:
        path = _idx_path(folder, stem)
        if path is None:
            raise DatasetError(f"{folder / stem}: the file is missing")
        arrays.append(read_idx(path, rank=rank))
    x_train, y_train, x_test, y_test = arrays
    for x, y, what in ((x_train, y_train, "training"), (x_test, y_test, "test")):
        if len(x) != len(y):
            raise DatasetError(f"{folder}: {len(x)} {what} images but {len(y)} labels")
    return (
        x_train[:, None],
        y_train.astype(np.int64),
        x_test[:, None],
        y_test.astype(np.int64),
    )


def read_idx(path: Path, *, rank: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    Raises:
        DatasetError: If it is not such a file, or is truncated.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: damaged or truncated: {error}") from error
    if len(data) < 4 + 4 * rank or data[:4] != bytes([0, 0, 8, rank]):
        raise DatasetError(f"{path}: not an IDX file of unsigned bytes with {rank} dimensions")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if len(body) != math.prod(shape):
        raise DatasetError(
            f"{path}: damaged or truncated: {len(body)} bytes of data, shape {shape} needs "
            f"{math.prod(shape)}"
        )
    return body.reshape(shape).copy()
