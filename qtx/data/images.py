"""Images with labels: CIFAR-10, MNIST and folders of one's own, decoded once into memory, and their batches.

A batch holds the bytes of its images; a model brings them to its own scale (`qtx.nn.vit.normalised`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qtx.data.batching import Plan, PlannedBatches, plan_epoch
from qtx.data.reading import (
    check_limits,
    find_files,
    from_tfds,
    held_apart,
    labelled_folders,
    limited,
    places,
    read_bytes,
    stratified,
)
from qtx.data.tasks import IMAGE_TASKS, Task, get_task
from qtx.errors import UserError, near_misses

SUFFIXES = (".png", ".jpg", ".jpeg")
VALIDATION_SHARE = 0.1
"""Part of the training images of every class that becomes the validation split, where a data set has none."""

_MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """One split.

    Attributes:
      pixels: uint8 [N, S, S, K], K being 3 for colours and 1 for grey.
      labels: [N] int32 class ids.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Images:
        """Returns the images at these row numbers, in that order."""
        return Images(self.pixels[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """A task with its splits: always `train` and `validation`, and `test` where there is one."""

    task: Task
    splits: dict[str, Images]


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Images that are not decoded yet.

    Attributes:
      names: where each comes from, for errors.
      contents: PNG or JPEG.
      labels: [N] int32 class ids.
    """

    names: list[str]
    contents: list[bytes]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> _Files:
        return _Files([self.names[row] for row in rows], [self.contents[row] for row in rows], self.labels[rows])

    def decoded(self, channels: int, size: int | None = None) -> Images:
        """Returns the images, resized to `size` pixels or all as large as the first."""
        found: list[np.ndarray] = []
        for name, content in zip(self.names, self.contents, strict=True):
            try:
                image = Image.open(io.BytesIO(content)).convert(_MODES[channels])
            except (OSError, ValueError) as error:
                raise UserError(f"{name} is no readable image ({error}); fetch it again or remove it") from error
            if size is not None:
                image = _resized(image, size)
            pixels = np.asarray(image).reshape(image.height, image.width, channels)
            if image.height != image.width or (found and pixels.shape != found[0].shape):
                wanted = f"{found[0].shape[1]} x {found[0].shape[0]}" if found else "squares"
                raise UserError(
                    f"{name} has {image.width} x {image.height} pixels, others are {wanted}; set data.resize=True to have all "
                    "of them resized"
                )
            found.append(pixels)
        return Images(np.stack(found), self.labels)


def load_images(
    task: str | Task,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> ImageDataset:
    """Loads a built-in task of images.

    CIFAR-10 is read from `train.tar.gz` and `test.tar.gz` with `SPLIT/CLASS/*.jpg` (or PNG) in `<data_dir>/cifar10/`, MNIST
    from its four IDX files (plain or .gz) in `<data_dir>/mnist/`, and both from tensorflow-datasets where there is no such
    directory. A tenth of the training images of every class, drawn with `seed`, is the validation split.

    Args:
      task: a name in `tasks.IMAGE_TASKS`, or that task.
      data_dir: where the files are; the environment variable QTX_DATA_DIR when not given.
      seed: of the validation split and of the limited subsets.
      limit_train: keep a random subset of at most this many training images; the others are never decoded.
      limit_eval: the same for every other split.

    Raises:
      UserError: unknown task, bad limit, missing or damaged data.
    """
    task = get_task(task) if isinstance(task, str) else task
    if task.name not in IMAGE_TASKS:
        raise UserError(f"task {task.name!r} has no images{near_misses(task.name, IMAGE_TASKS)}")
    check_limits(limit_train, limit_eval)
    searched = places(data_dir, (task.name,))
    folder = next((path for path in searched if path.is_dir()), None)
    raw: dict[str, Images] | dict[str, _Files]
    if folder is None:
        raw = _load_tfds(task, searched)
    else:
        raw = _load_cifar10(task, folder) if task.name == "cifar10" else _load_mnist(task, folder)
    held_out = stratified(raw["train"].labels, VALIDATION_SHARE, seed)
    splits = {**held_apart(raw["train"], held_out, folder or Path(task.name)), "test": raw["test"]}
    kept = limited(splits, limit_train, limit_eval, seed)
    return ImageDataset(task, {name: _in_memory(split) for name, split in kept.items()})


def load_image_folder(
    path: str | os.PathLike[str],
    channels: int = 3,
    size: int | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> ImageDataset:
    """Loads images (PNG or JPEG) that are sorted into folders.

    Either `path/train/LABEL/*` and `path/validation/LABEL/*`, or `path/LABEL/*`, of which a tenth of every class becomes the
    validation split.

    Args:
      path: the top folder.
      channels: 3 for colours, 1 for grey; images are converted.
      size: height and width that all images are resized to (the proportions are not kept); None: they are equal squares.
      seed: of the split, where one has to be made, and of the limited subsets.
      limit_train: keep a random subset of at most this many training images.
      limit_eval: the same for the validation images.

    Raises:
      UserError: a missing folder, an unreadable image, images of different sizes, fewer than two labels.
    """
    root = Path(path)
    check_limits(limit_train, limit_eval)
    if channels not in _MODES:
        raise UserError(f"images have 1 or 3 channels, not {channels}")
    files, labels = labelled_folders(root, SUFFIXES)
    splits = {
        name: _Files(
            [str(file) for file in found],
            [read_bytes(file) for file in found],
            np.array([labels.index(file.parent.name) for file in found], np.int32),
        )
        for name, found in files.items()
    }
    if len(splits) == 1:
        train = splits["train"]
        splits = held_apart(train, stratified(train.labels, VALIDATION_SHARE, seed), root)
    kept = limited(splits, limit_train, limit_eval, seed)
    task = Task(root.resolve().name, (), labels)
    found = {name: split.decoded(channels, size) for name, split in kept.items()}
    shapes = {name: split.pixels.shape[1:] for name, split in found.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{root}: the splits have images of different sizes ({shapes}); set data.resize=True")
    return ImageDataset(task, found)


def _in_memory(split: Images | _Files) -> Images:
    return split.decoded(3) if isinstance(split, _Files) else split


def _resized(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


# ------------------------------------------------------------------------------------------------- files


def _load_cifar10(task: Task, folder: Path) -> dict[str, _Files]:
    """Small photographs of ten kinds of things (Krizhevsky 2009), in archives of image files."""
    paths = find_files(task.name, folder, {"train": ("train.tar",), "test": ("test.tar",)})
    return {name: _read_archive(path, task.labels) for name, path in paths.items()}


def _read_archive(path: Path, labels: Sequence[str]) -> _Files:
    names, contents, ids = [], [], []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or Path(member.name).suffix.lower() not in SUFFIXES:
                    continue
                label = Path(member.name).parent.name
                if label not in labels:
                    raise UserError(f"{path}: {member.name} is of no known class{near_misses(label, labels)}")
                file = archive.extractfile(member)
                assert file is not None, "it is a file"
                names.append(f"{path}: {member.name}")
                contents.append(file.read())
                ids.append(labels.index(label))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; it is damaged or cut short, fetch it again") from error
    if not names:
        raise UserError(f"{path} holds no images; it must have CLASS/*.jpg")
    return _Files(names, contents, np.array(ids, np.int32))


def _load_mnist(task: Task, folder: Path) -> dict[str, Images]:
    """Handwritten digits (LeCun et al. 1998)."""
    stems = {"train": "train", "test": "t10k"}
    kinds = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
    files = {f"{split} {kind}": (f"{stem}-{end}",) for split, stem in stems.items() for kind, end in kinds.items()}
    paths = find_files(task.name, folder, files)
    found = {}
    for split in stems:
        pixels, labels = (read_idx(paths[f"{split} {kind}"], 3 if kind == "images" else 1) for kind in kinds)
        if len(pixels) != len(labels):
            other = paths[f"{split} labels"].name
            raise UserError(
                f"{paths[f'{split} images']} has {len(pixels)} images and {other} {len(labels)} labels; fetch both again"
            )
        if labels.max(initial=0) >= task.num_labels:
            raise UserError(f"{paths[f'{split} labels']} has the label {labels.max()}; digits go from 0 to 9")
        found[split] = Images(pixels[..., None], labels.astype(np.int32))
    return found


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads a file of unsigned bytes in the IDX format: two zeros, the type, the number of axes, sizes, values.

    Args:
      path: plain or compressed.
      ndim: how many axes it must have.

    Raises:
      UserError: another format, another number of axes, or a file that is cut short.
    """
    data = read_bytes(path)
    start = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < start:
        raise UserError(f"{path} is no IDX file of bytes with {ndim} axes; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, 4))
    count = int(np.prod(shape))
    if len(data) != start + count:
        raise UserError(f"{path} has {len(data) - start} values where its header says {count}; fetch it again")
    return np.frombuffer(data, np.uint8, count, start).reshape(shape)


def _load_tfds(task: Task, searched: Sequence[Path]) -> dict[str, Images]:
    assert task.tfds is not None, "only tasks with a builder come here"
    official, host = {
        "cifar10": ("cifar10/train.tar.gz", "https://www.cs.toronto.edu"),
        "mnist": ("mnist/train-images-idx3-ubyte.gz", "https://storage.googleapis.com"),
    }[task.name]
    found = {}
    for name, source in from_tfds(task.name, task.tfds, host, official, searched).items():
        rows = list(source)
        labels = np.array([row["label"] for row in rows], np.int32)
        found[name] = Images(np.stack([np.asarray(row["image"], np.uint8) for row in rows]), labels)
    return found


# ----------------------------------------------------------------------------------------------- batches


def augmented(pixels: np.ndarray, offsets: np.ndarray, mirrored: np.ndarray, padding: int) -> np.ndarray:
    """Returns images [B, S, S, K] shifted and mirrored.

    Args:
      pixels: [B, S, S, K].
      offsets: [2, B] int from 0 to `2 * padding`: where the crop begins in the padded image, from top and left.
      mirrored: [B] bool: left and right change places.
      padding: black pixels on every side.
    """
    side, rows = np.arange(pixels.shape[1]), np.arange(len(pixels))
    wide = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    down, right = (offset[:, None] + side for offset in offsets)
    cut = wide[rows[:, None, None], down[:, :, None], right[:, None, :]]
    return np.where(mirrored[:, None, None, None], cut[:, :, ::-1], cut)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatches(PlannedBatches):
    """All batches of a run of a task of images, by global step.

    A batch is a dict of numpy arrays with B = batch_size / shard_count rows: `pixels` [B, size, size, channels] uint8;
    `labels` [B] int32; `weights` [B] float32, 0 in filler rows; `index` [B] int32, the image's number, -1 in filler rows.
    Filler rows repeat an image of the batch: so no range of a whole tensor is changed by them, and models need no mask.

    Attributes:
      encoded: the images.
      batch_size: rows per batch over all hosts together.
      size: height and width; images of another size are resized.
      channels: 3 or 1; grey images have three equal channels where 3 are wanted.
      seed: of the shuffle and of what is drawn for each image.
      shuffle: a new order every epoch; otherwise always the same.
      crop: images are shifted by up to so many pixels in both directions, at random; black pixels come in.
      flip: half of the images are mirrored, left and right, at random.
      epochs: how many; None for no end.
      shard_index: which host this is.
      shard_count: how many hosts; each reads its own contiguous rows of every batch.

    Raises:
      UserError: a bad argument.
    """

    encoded: Images
    batch_size: int
    size: int
    channels: int
    seed: int = 0
    shuffle: bool = True
    crop: int = 0
    flip: bool = False
    epochs: int | None = None
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        self._check_run()
        self._check_rows(self.batch_size)
        if self.crop < 0:
            raise UserError(f"crop {self.crop} is negative; 0 means that images are not shifted")
        if not len(self.encoded):
            raise UserError("there are no images to make batches of")
        found = self.encoded.pixels.shape[-1]
        if found not in (1, self.channels):
            raise UserError(f"the images have {found} channels, {self.channels} are wanted; use a model for {found}")

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """The number of batches, the same in every epoch."""
        return -(-len(self.encoded) // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of the batch of a global step, as `PlannedBatches` does, shifted and mirrored."""
        batch = super().__getitem__(step)
        if not self.crop and not self.flip:
            return batch
        # Drawn for the whole batch: what an image gets does not depend on the number of hosts.
        rng, whole = np.random.default_rng([self.seed, step, 1]), self.batch_size
        offsets = rng.integers(0, 2 * self.crop + 1, (2, whole))
        mirrored = rng.random(whole) < (0.5 if self.flip else 0)
        share = whole // self.shard_count
        mine = slice(self.shard_index * share, (self.shard_index + 1) * share)
        return batch | {"pixels": augmented(batch["pixels"], offsets[:, mine], mirrored[mine], self.crop)}

    def _make_plan(self, epoch: int) -> Plan:
        return plan_epoch(np.zeros(len(self.encoded), int), self.batch_size, self.seed, epoch, self.shuffle)

    def _rows(self, bucket: int) -> int:
        return self.batch_size

    def _assemble(self, index: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
        real = index >= 0
        rows = np.where(real, index, index.max(initial=0))
        return {
            "pixels": self._shaped(self.encoded.pixels[rows]),
            "labels": np.where(real, self.encoded.labels[rows], 0).astype(np.int32),
            "weights": real.astype(np.float32),
            "index": index.astype(np.int32),
        }

    def _shaped(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[1] != self.size:
            images = (Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in pixels)
            pixels = np.stack([np.asarray(_resized(image, self.size)) for image in images])
            pixels = pixels.reshape(len(pixels), self.size, self.size, -1)
        return np.broadcast_to(pixels, (*pixels.shape[:-1], self.channels))
