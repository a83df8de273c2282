from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgelearn.errors import DatasetError, PluginError
from edgelearn.scenario.datasets import Dataset, digits, load_dataset, read_idx
from edgelearn.scenario.spec import DataSpec

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def images(count: int) -> np.ndarray:
    return np.arange(count * 4 * 3).reshape(count, 4, 3) % 256


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the four files of a tiny MNIST, on a machine that has no other."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    root.mkdir()
    for stem, count in (("train", 5), ("t10k", 2)):
        (root / f"{stem}-images-idx3-ubyte").write_bytes(idx(images(count)))
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.arange(count)))
    return root


def mnist(root: Path | str) -> Dataset:
    return load_dataset(DataSpec(dataset="mnist", root=str(root)))


# -- digits ----------------------------------------------------------------------------------------


def test_digits():
    data = digits(DataSpec(dataset="digits"))
    assert data.x_train.shape == (1442, 1, 8, 8)
    assert data.x_test.shape == (355, 1, 8, 8)
    assert data.x_train.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.sample_shape == (1, 8, 8)
    assert np.array_equal(np.unique(data.y_train), np.arange(10))
    assert np.bincount(data.y_train).min() > 120
    assert set(np.bincount(data.y_test)) <= {34, 35, 36}  # alike for all classes
    assert data.x_train.max() * data.scale == 1.0
    assert data.num_classes == 10


def test_digits_are_the_digits():
    # Sums over all pixels by class tell a damaged or re-ordered file.
    data = digits(DataSpec(dataset="digits"))
    x = np.concatenate([data.x_train, data.x_test])
    y = np.concatenate([data.y_train, data.y_test])
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(x.sum()) == 561718


def test_no_test_image_is_a_training_image():
    data = digits(DataSpec(dataset="digits"))
    train = {image.tobytes() for image in data.x_train}
    assert not [image for image in data.x_test if image.tobytes() in train]


def test_max_train_and_max_test():
    whole = load_dataset(DataSpec(dataset="digits"))
    cut = load_dataset(DataSpec(dataset="digits", max_train=7, max_test=3))
    assert np.array_equal(cut.x_train, whole.x_train[:7])
    assert np.array_equal(cut.y_train, whole.y_train[:7])
    assert np.array_equal(cut.x_test, whole.x_test[:3])
    assert np.array_equal(cut.y_test, whole.y_test[:3])
    assert len(load_dataset(DataSpec(dataset="digits", max_train=10**9)).y_train) == 1442


# -- IDX files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_read_idx(tmp_path, compress):
    path = tmp_path / ("x.gz" if compress else "x")
    data = idx(images(3))
    path.write_bytes(gzip.compress(data) if compress else data)
    array = read_idx(path, rank=3)
    assert np.array_equal(array, images(3))
    assert array.dtype == np.uint8
    array[0] = 0  # ours, to be written to


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not an IDX file"),
        (idx(images(3))[:15], "not an IDX file"),
        (idx(images(3))[:-1], "damaged or truncated: 35 bytes of data, shape .3, 4, 3. needs 36"),
        (idx(images(3)) + b"x", "37 bytes of data, .* needs 36"),
        (idx(np.arange(3)), "with 3 dimensions"),
        (b"\0\0\x0d\3" + idx(images(3))[4:], "of unsigned bytes"),
        (b"\0\1\x08\3" + idx(images(3))[4:], "not an IDX file"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"abc", "damaged or truncated: 3 bytes"),
    ],
)
def test_a_damaged_idx_file(tmp_path, data, expected):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=expected) as error:
        read_idx(path, rank=3)
    assert str(path) in str(error.value)


def wrong_block(data: bytes) -> bytes:
    return data[:10] + b"\xff" + data[11:]


def wrong_byte(data: bytes) -> bytes:
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: b"no" + d, wrong_block, wrong_byte])
def test_a_damaged_gzip_file(tmp_path, damage):
    path = tmp_path / "x.gz"
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 9))
    path.write_bytes(damage(gzip.compress(idx(noise))))
    with pytest.raises(DatasetError, match=r"x\.gz: damaged or truncated"):
        read_idx(path, rank=3)


# -- where data sets lie ---------------------------------------------------------------------------


def test_files_in_a_folder(folder):
    data = mnist(folder)
    assert data.x_train.shape == (5, 1, 4, 3)
    assert data.x_test.shape == (2, 1, 4, 3)
    assert np.array_equal(data.x_train[:, 0], images(5))
    assert data.y_train.tolist() == [0, 1, 2, 3, 4]
    assert data.y_train.dtype == np.int64


def test_gzipped_files_in_a_folder(folder):
    plain = mnist(folder)
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert np.array_equal(mnist(folder).x_train, plain.x_train)


@pytest.mark.parametrize(
    "place", ["root/MNIST/raw", "root/raw", "data/MNIST/raw", "home/data/MNIST/raw"]
)
def test_the_layout_of_torchvision(folder, tmp_path, place):
    target = tmp_path / place
    target.parent.mkdir(parents=True)
    folder.rename(target)
    assert len(mnist(tmp_path / "root").y_train) == 5


def test_the_root_goes_before_the_usual_places(folder, tmp_path):
    usual = tmp_path / "data" / "MNIST" / "raw"
    usual.mkdir(parents=True)
    for path in folder.iterdir():
        (usual / path.name).write_bytes(path.read_bytes())
    for stem, what in (("images-idx3", images(1)), ("labels-idx1", np.zeros(1))):
        (folder / f"t10k-{stem}-ubyte").write_bytes(idx(what))
    assert len(mnist(folder).y_test) == 1
    assert len(mnist("").y_test) == 2


def test_missing_files_list_the_folders_looked_in(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetError) as error:
        mnist(folder)
    message = str(error.value)
    assert "mnist is nowhere on this machine" in message
    for place in (
        folder,
        folder / "MNIST" / "raw",
        "/usr/share/datasets/mnist",
        tmp_path / "home" / ".cache" / "edgelearn" / "MNIST" / "raw",
    ):
        assert f"\n  {place}\n" in message
    assert "--set data.download=true" in message


def test_images_and_labels_must_match(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(3)))
    with pytest.raises(DatasetError, match=r"2 test images but 3 labels"):
        mnist(folder)


def test_a_label_that_is_no_class(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1, 2, 3, 10])))
    with pytest.raises(DatasetError, match=r"training labels are int64 from 0 to 10, .* 0 to 9"):
        mnist(folder)


# -- data sets of others ---------------------------------------------------------------------------

TOY = Dataset(
    "toy",
    np.zeros((4, 2), np.uint8),
    np.array([0, 1, 0, 1]),
    np.zeros((2, 2), np.uint8),
    np.array([0, 1]),
    2,
    scale=1.0,
    users_train=np.array([7, 7, 8, 8]),
    users_test=np.array([7, 8]),
)


def given(dataset, monkeypatch, **kwargs):
    monkeypatch.setattr("edgelearn.plugins.resolve", lambda _name, _group: lambda _spec: dataset)
    return load_dataset(DataSpec(dataset="m:f", **kwargs))


def test_users_are_cut_with_the_samples(monkeypatch):
    data = given(TOY, monkeypatch, max_train=3, max_test=1)
    assert data.users_train.tolist() == [7, 7, 8]
    assert data.users_test.tolist() == [7]
    assert len(data.y_train) == len(data.x_train) == 3


def test_a_cut_takes_of_each_experience_in_proportion(monkeypatch):
    owner = np.array([0] * 8 + [1] * 4 + [2])
    x = np.arange(13, dtype=np.uint8)[:, None]
    sized = replace(
        TOY,
        x_train=x,
        y_train=np.zeros(13, np.int64),
        users_train=None,
        x_test=x,
        y_test=np.zeros(13, np.int64),
        users_test=None,
        experiences_train=owner,
        experiences_test=owner,
    )
    data = given(sized, monkeypatch, max_train=7, max_test=3)
    assert data.x_train[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 12]
    assert data.experiences_train.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert data.x_test[:, 0].tolist() == [0, 8, 12]
    assert data.experiences_test.tolist() == [0, 1, 2]
    with pytest.raises(DatasetError, match="cut to 2, fewer than the 3 experiences"):
        given(sized, monkeypatch, max_train=2)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (None, "m:f returned NoneType, expected a Dataset"),
        (replace(TOY, y_train=np.array([0, 1])), "4 training samples but 2 labels"),
        (replace(TOY, y_test=np.array([0, 2])), "test labels are int64 from 0 to 2"),
        (replace(TOY, y_test=np.array([-1, 0])), "from -1 to 0, expected int64 from 0 to 1"),
        (replace(TOY, y_test=np.array([0, 1], np.uint8)), "labels are uint8"),
        (replace(TOY, users_test=np.array([7])), "1 test users but 2 labels"),
        (replace(TOY, x_test=np.zeros((2, 3), np.uint8)), r"are \(2,\), test samples \(3,\)"),
        (
            replace(TOY, x_train=TOY.x_train[:0], y_train=TOY.y_train[:0], users_train=None),
            "0 training samples but 0 labels",
        ),
        (
            replace(TOY, experiences_test=np.array([0, 1])),
            "experiences of test samples, but none of training",
        ),
        (
            replace(TOY, experiences_train=np.array([0, 1])),
            "of training samples are 2 int64, expected 4",
        ),
        (
            replace(TOY, experiences_train=np.array([0, 1, 0, 1], np.int32)),
            "are 4 int32, expected 4 int64",
        ),
        (
            replace(TOY, experiences_train=np.array([0, 2, 0, 2])),
            r"training samples are of the experiences \[0, 2\]; each of 0 to 2 needs some",
        ),
        (
            replace(
                TOY,
                experiences_train=np.array([0, 1, 0, 1]),
                experiences_test=np.array([1, 1]),
            ),
            r"test samples are of the experiences \[1\]",
        ),
    ],
)
def test_a_data_set_that_does_not_fit_together(monkeypatch, dataset, expected):
    with pytest.raises(DatasetError, match=expected):
        given(dataset, monkeypatch)


def test_an_unknown_data_set():
    with pytest.raises(PluginError, match="did you mean 'digits'"):
        load_dataset(DataSpec(dataset="digit"))


@pytest.mark.skipif(
    not FASHION.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist"
)
def test_fashion_mnist():
    data = load_dataset(DataSpec(dataset="fashion-mnist"))
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.x_test.shape == (10000, 1, 28, 28)
    assert np.bincount(data.y_train).tolist() == [6000] * 10
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    pixels = data.x_train.astype(np.float32) * data.scale
    assert pixels.mean() == pytest.approx(data.mean, abs=1e-3)
    assert pixels.std() == pytest.approx(data.std, abs=1e-3)
