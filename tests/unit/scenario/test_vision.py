"""Images by torchvision: networks for any depth, folders of images, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgelearn.errors import DatasetError, ExtraMissingError
from edgelearn.scenario import vision
from edgelearn.scenario.datasets import load_dataset
from edgelearn.scenario.spec import DataSpec


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_mobilenet_answers_images_of_any_depth_and_gets_narrower() -> None:
    whole = vision.mobilenet_v2(input_shape=(3, 32, 32), num_classes=10)
    assert size_of(whole) == 2_236_682  # torchvision's, with 10 classes
    grey = vision.mobilenet_v2(input_shape=(1, 28, 28), num_classes=10)
    assert size_of(grey) == 2_236_682 - 2 * 32 * 9
    narrow = vision.mobilenet_v2(input_shape=(1, 28, 28), num_classes=7, width=0.25)
    assert size_of(narrow) < size_of(grey) / 5
    assert narrow.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (64,)}, r"needs images \[C, H, W\], samples are \(64,\)"),
        ({"width": 0}, "width is 0; above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; 0 to less than 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision.mobilenet_v2(**{"input_shape": (1, 8, 8), "num_classes": 2, **arguments})


def write_images(folder: Path, count: int, colour: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 64), colour).save(folder / f"{number:02d}.png")


def spec(root: Path | str) -> DataSpec:
    return DataSpec(dataset="image-folder", root=str(root))


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        write_images(tmp_path / part / "red", count, (255, 0, 0))
        write_images(tmp_path / part / "green", count + 1, (0, 255, 0))
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    found = load_dataset(spec(tmp_path))
    assert found.x_train.shape == (7, 3, 32, 32)
    assert found.x_train.dtype == np.uint8
    assert found.y_train.tolist() == [0, 1, 0, 1, 0, 1, 0]  # green, red, in turn
    assert found.y_test.tolist() == [0, 1, 0, 1, 0]
    first = load_dataset(replace(spec(tmp_path), max_train=2))
    assert first.y_train.tolist() == [0, 1]
    assert found.x_train[0, :, 0, 0].tolist() == [0, 255, 0]
    assert found.num_classes == 2
    scaled = found.x_train * found.scale
    assert found.mean == pytest.approx(scaled.mean())
    assert found.std == pytest.approx(scaled.std())


def test_every_fifth_of_a_folder_without_parts_is_a_test_image(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 11, (9, 9, 9))
    write_images(tmp_path / "b", 5, (200, 200, 200))
    found = load_dataset(spec(tmp_path))
    assert found.y_train.tolist() == [0, 1] * 4 + [0] * 5
    assert found.y_test.tolist() == [0, 1, 0]
    assert np.unique(found.x_train[found.y_train == 1]).tolist() == [200]


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"name its folder: \[data\] root"):
        load_dataset(spec(""))
    with pytest.raises(DatasetError, match="is not a folder"):
        load_dataset(spec(tmp_path / "nowhere"))
    write_images(tmp_path / "a", 5, (1, 1, 1))
    with pytest.raises(DatasetError, match="1 class folder"):
        load_dataset(spec(tmp_path))
    (tmp_path / "b").mkdir()
    with pytest.raises(DatasetError, match="b: no images"):
        load_dataset(spec(tmp_path))
    (tmp_path / "b" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(DatasetError, match=r"0\.png: not an image, or damaged"):
        load_dataset(spec(tmp_path))
    (tmp_path / "b" / "0.png").unlink()
    write_images(tmp_path / "b" / "deep", 4, (2, 2, 2))
    with pytest.raises(DatasetError, match="'b' has fewer than 5 images"):
        load_dataset(spec(tmp_path))
    broken = (tmp_path / "b" / "deep" / "03.png").read_bytes().replace(b"IDAT", b"I AT")
    (tmp_path / "b" / "deep" / "03.png").write_bytes(broken)
    with pytest.raises(DatasetError, match=r"03\.png: not an image, or damaged"):
        load_dataset(spec(tmp_path))
    write_images(tmp_path / "train" / "a", 1, (1, 1, 1))
    with pytest.raises(DatasetError, match=r"there is train/, but not both"):
        load_dataset(spec(tmp_path))
    write_images(tmp_path / "train" / "b", 1, (1, 1, 1))
    write_images(tmp_path / "val" / "a", 1, (1, 1, 1))
    write_images(tmp_path / "val" / "c", 1, (1, 1, 1))
    with pytest.raises(DatasetError, match="'b' is in one of train and val only"):
        load_dataset(spec(tmp_path))


def test_cifar_10_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cifar-10-batches-py"):
        load_dataset(DataSpec(dataset="cifar-10", root=str(tmp_path / "none")))


def test_cifar_10_has_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(root: Path, *, train: bool, download: bool) -> Any:
        assert root == tmp_path
        assert not download
        count = 5 if train else 2
        data = np.zeros((count, 32, 32, 3), np.uint8)
        data[..., 1] = 7
        return SimpleNamespace(data=data, targets=list(range(count)))

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(vision, "_torchvision", lambda *_: SimpleNamespace(CIFAR10=images))
    found = load_dataset(DataSpec(dataset="cifar-10", root=str(tmp_path)))
    assert found.x_train.shape == (5, 3, 32, 32)
    assert found.x_train[0, :, 3, 4].tolist() == [0, 7, 0]
    assert found.y_test.tolist() == [0, 1]


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(vision.importlib, "import_module", missing)
    with pytest.raises(ExtraMissingError, match=r"mobilenet_v2.*edgelearn\[vision\]"):
        vision.mobilenet_v2(input_shape=(3, 32, 32), num_classes=2)
    with pytest.raises(ExtraMissingError, match=r"image-folder.*edgelearn\[vision\]"):
        vision._reader()
