"""Readers of images on small files made here, batches, and the real data where they are."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtx.data import images
from qtx.data.images import ImageBatches, Images, augmented, load_image_folder, load_images, read_idx
from qtx.data.tasks import IMAGE_TASKS
from qtx.errors import UserError

CLASSES = IMAGE_TASKS["cifar10"].labels


def encode(pixels, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def flat(colour, size=8):
    """A square of one colour, which JPEG keeps."""
    return np.full((size, size, 3), colour, np.uint8)


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar(root, per_class=4):
    """CIFAR-10 of 8 x 8 pixels: class c is the grey 20 c, and its i-th image is one brighter than the last."""
    folder = root / "cifar10"
    folder.mkdir()
    for split, count in (("train", per_class), ("test", 2)):
        files = {
            f"{split}/{name}/{i:04d}.jpg": encode(flat(20 * c + i))
            for c, name in enumerate(CLASSES)
            for i in range(count)
        }
        write_archive(folder / f"{split}.tar.gz", files)
    return folder


def write_idx(path, values):
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_mnist(root, count=40):
    """MNIST of 6 x 6 pixels: all of them are 25 times the label."""
    folder = root / "mnist"
    folder.mkdir()
    for stem in ("train", "t10k"):
        labels = np.arange(count) % 10
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", np.broadcast_to(25 * labels[:, None, None], (count, 6, 6)))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder


def test_cifar10(tmp_path):
    write_cifar(tmp_path)
    found = load_images("cifar10", tmp_path, seed=3)
    assert found.task.labels[3] == "cat"
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 30, "validation": 10, "test": 20}
    for split in found.splits.values():
        assert split.pixels.shape[1:] == (8, 8, 3) and split.pixels.dtype == np.uint8
        np.testing.assert_array_equal(np.round(split.pixels.mean((1, 2, 3))) // 20, split.labels)
    assert sorted(found.splits["validation"].labels) == list(range(10))
    again, other = load_images("cifar10", tmp_path, seed=3), load_images("cifar10", tmp_path, seed=4)
    np.testing.assert_array_equal(again.splits["train"].pixels, found.splits["train"].pixels)
    assert not np.array_equal(other.splits["train"].pixels, found.splits["train"].pixels)


def test_what_a_limit_leaves_out_is_not_decoded(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    decoded = []
    monkeypatch.setattr(images._Files, "decoded", lambda self, channels: decoded.append(len(self)) or self)
    load_images("cifar10", tmp_path, limit_train=5, limit_eval=3)
    assert decoded == [5, 3, 3]


def test_mnist(tmp_path):
    write_mnist(tmp_path)
    found = load_images("mnist", tmp_path)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 30, "validation": 10, "test": 40}
    for split in found.splits.values():
        np.testing.assert_array_equal(split.pixels[:, 5, 0], 25 * split.labels[:, None])


def test_folder(tmp_path):
    for label, colour in (("dark", 10), ("light", 200)):
        (tmp_path / label).mkdir()
        for i in range(4):
            kind, suffix = (("PNG", "png"), ("JPEG", "JPG"))[i % 2]
            (tmp_path / label / f"{i}.{suffix}").write_bytes(encode(flat(colour, 6), kind))
        (tmp_path / label / "notes.txt").write_text("no image")
    found = load_image_folder(tmp_path, channels=1)
    assert found.task.labels == ("dark", "light") and found.task.name == tmp_path.name
    assert {name: split.pixels.shape for name, split in found.splits.items()} == {
        "train": (6, 6, 6, 1),
        "validation": (2, 6, 6, 1),
    }
    np.testing.assert_array_equal(found.splits["train"].pixels[:, 0, 0, 0] > 100, found.splits["train"].labels)
    (tmp_path / "dark" / "9.png").write_bytes(encode(flat(10, 7), "PNG"))
    with pytest.raises(UserError, match="9.png has 7 x 7 pixels, others are 6 x 6; set data.resize"):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path, size=5).splits["train"].pixels.shape == (7, 5, 5, 3)
    assert len(load_image_folder(tmp_path, size=5, limit_train=2).splits["train"]) == 2


def test_tensorflow_datasets_where_there_are_no_files(monkeypatch):
    asked = []
    rows = [{"image": np.full((4, 4, 1), i), "label": i % 2} for i in range(8)]

    def from_tfds(task, builder, host, official, searched):
        asked.append((task, builder, official))
        return {"train": rows, "test": rows}

    monkeypatch.delenv("QTX_DATA_DIR", raising=False)
    monkeypatch.setattr(images, "from_tfds", from_tfds)
    found = load_images("mnist")
    assert asked == [("mnist", "mnist", "mnist/train-images-idx3-ubyte.gz")]
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 6, "validation": 2, "test": 8}
    np.testing.assert_array_equal(found.splits["test"].pixels[:, 0, 0, 0], np.arange(8))


# --- What is wrong with a file ---


def test_damaged_cifar10(tmp_path):
    folder = write_cifar(tmp_path)
    archive, whole = folder / "test.tar.gz", (folder / "test.tar.gz").read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="test.tar.gz: .*damaged or cut short"):
        load_images("cifar10", tmp_path)
    write_archive(archive, {"test/cats/0.jpg": encode(flat(1))})
    with pytest.raises(UserError, match="test/cats/0.jpg is of no known class; did you mean 'cat'"):
        load_images("cifar10", tmp_path)
    write_archive(archive, {"test/cat/0.jpg": encode(flat(1))[:40]})
    with pytest.raises(UserError, match="test/cat/0.jpg is no readable image"):
        load_images("cifar10", tmp_path)
    write_archive(archive, {"test/notes.txt": b"empty"})
    with pytest.raises(UserError, match="test.tar.gz holds no images"):
        load_images("cifar10", tmp_path)
    archive.unlink()
    with pytest.raises(UserError, match=r"cifar10: missing file .*test.tar\[.gz\]"):
        load_images("cifar10", tmp_path)


def test_damaged_mnist(tmp_path):
    folder = write_mnist(tmp_path)
    path = folder / "t10k-images-idx3-ubyte.gz"
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:-7]))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz has 1433 values where its header says 1440"):
        load_images("mnist", tmp_path)
    path.write_bytes(gzip.compress(data[:6]))
    with pytest.raises(UserError, match="no IDX file of bytes with 3 axes"):
        read_idx(path, 3)
    write_idx(path, np.zeros((39, 6, 6)))
    with pytest.raises(UserError, match="has 39 images and t10k-labels-idx1-ubyte.gz 40 labels"):
        load_images("mnist", tmp_path)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(39, 10))
    with pytest.raises(UserError, match="has the label 10"):
        load_images("mnist", tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"missing file .*train-labels-idx1-ubyte\[.gz\]"):
        load_images("mnist", tmp_path)


# --- Batches ---


def some(count=10, size=4, channels=1):
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (count, size, size, channels), np.uint8), np.arange(count, dtype=np.int32))


def test_batches_hold_every_image_once_and_fillers_repeat_one():
    found = ImageBatches(some(), 4, 4, 1, seed=1, epochs=2)
    assert len(found) == 6
    for epoch in range(2):
        batches = [found[3 * epoch + i] for i in range(3)]
        index = np.concatenate([batch["index"] for batch in batches])
        real = index >= 0
        assert sorted(index[real]) == list(range(10))
        np.testing.assert_array_equal(np.concatenate([batch["weights"] for batch in batches]), real)
        for batch in batches:
            rows = batch["index"] >= 0
            np.testing.assert_array_equal(batch["pixels"][rows], found.encoded.pixels[batch["index"][rows]])
            for filler in batch["pixels"][~rows]:
                assert any(np.array_equal(filler, image) for image in batch["pixels"][rows])
    assert not np.array_equal(found[0]["index"], found[3]["index"]), "a new order every epoch"
    ordered = ImageBatches(some(), 4, 4, 1, shuffle=False, epochs=1)
    np.testing.assert_array_equal(ordered[1]["index"], [4, 5, 6, 7])
    assert [len(batch["labels"]) for batch in ordered] == [4, 4, 4]


def test_crops_and_flips_are_a_function_of_seed_and_step():
    data = Images(some(64).pixels, np.zeros(64, np.int32))
    found = ImageBatches(data, 32, 4, 1, seed=1, crop=1, flip=True)
    np.testing.assert_array_equal(found[1]["pixels"], ImageBatches(data, 32, 4, 1, 1, crop=1, flip=True)[1]["pixels"])
    kinds = set()
    for step in range(4):
        batch = found[step]
        for image, index in zip(batch["pixels"][..., 0], batch["index"], strict=True):
            padded = np.pad(data.pixels[index, :, :, 0], 1)
            options = {
                (top, left, mirrored): padded[top : top + 4, left : left + 4][:, :: -1 if mirrored else 1]
                for top in range(3)
                for left in range(3)
                for mirrored in (False, True)
            }
            matching = [key for key, option in options.items() if np.array_equal(option, image)]
            assert matching, "an image is a crop of itself, mirrored or not"
            kinds |= set(matching)
    assert len(kinds) == 18
    halves = [ImageBatches(data, 32, 4, 1, 1, crop=1, flip=True, shard_index=i, shard_count=2)[1] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([half["pixels"] for half in halves]), found[1]["pixels"])
    assert not np.array_equal(ImageBatches(data, 32, 4, 1, 1)[1]["pixels"], found[1]["pixels"])


def test_crop_by_hand():
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    found = augmented(image, np.array([[0], [2]]), np.array([False]), 1)
    np.testing.assert_array_equal(found[0, :, :, 0], [[0, 0], [1, 0]])


def test_images_are_brought_to_the_shape_of_the_model():
    grey = ImageBatches(some(), 5, 8, 3, shuffle=False)[0]["pixels"]
    assert grey.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    colours = Images(np.broadcast_to(np.uint8([10, 20, 30]), (2, 4, 4, 3)), np.zeros(2, np.int32))
    np.testing.assert_array_equal(ImageBatches(colours, 2, 6, 3)[0]["pixels"][1, 5, 5], [10, 20, 30])
    for fields, named in (
        (dict(channels=1), "3 channels, 1 are wanted"),
        (dict(crop=-1), "crop -1 is negative"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(batch_size=3, shard_count=2), "use 4"),
    ):
        with pytest.raises(UserError, match=named):
            ImageBatches(**dict(encoded=colours, batch_size=2, size=4, channels=3) | fields)


# --- The real files ---


def real(task):
    root = os.environ.get("QTX_DATA_DIR")
    if not root or not (Path(root) / task).is_dir():
        pytest.skip(f"QTX_DATA_DIR names no directory with {task}/")
    return root


def test_the_real_mnist():
    found = load_images("mnist", real("mnist"))
    assert {name: split.pixels.shape for name, split in found.splits.items()} == {
        "train": (54001, 28, 28, 1),
        "validation": (5999, 28, 28, 1),
        "test": (10000, 28, 28, 1),
    }
    np.testing.assert_array_equal(found.splits["test"].labels[:10], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9])
    np.testing.assert_allclose(found.splits["train"].pixels[:, :, :, 0].mean() / 255, 0.1307, atol=5e-4)


def test_the_real_cifar10():
    found = load_images("cifar10", real("cifar10"), limit_train=500, limit_eval=500)
    train = found.splits["train"]
    assert train.pixels.shape == (500, 32, 32, 3) and set(train.labels) == set(range(10))
    np.testing.assert_allclose(train.pixels.mean((0, 1, 2)) / 255, [0.491, 0.482, 0.447], atol=0.03)
