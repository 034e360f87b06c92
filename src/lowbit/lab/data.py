"""Data sets for experiments: digits, idx files, image folders and archives, text, sentence pairs.

`load(source)` reads one into memory as `Data`, whose `batches` feed a training loop.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.lab import archives, images
from lowbit.lab.dataset import BOS, EOS, IGNORE, PAD, UNK, Data
from lowbit.serial import nearest

__all__ = ["BOS", "EOS", "IGNORE", "PAD", "SOURCES", "UNK", "Data", "load", "without_place", "words"]

Arrays = dict[str, Any]


def words(sentence: str) -> list[str]:
    """Lower-case words and single punctuation marks: "Two men's hats." -> two men ' s hats ."""
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory where it may be written to, and copies it otherwise."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def classification(source: str, arrays: Arrays, names: list[str], digest: str = "", *, flip: bool) -> Data:
    """Images and labels as `Data`, with the statistics of the training images; `digest` when it is known."""
    x = arrays["x_train"]
    counts = np.stack([np.bincount(x[:, c].reshape(-1), minlength=256) for c in range(x.shape[1])])  # (C, 256)
    values, share = np.arange(256), counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return Data(
        task="classification",
        train=(tensor(x), tensor(arrays["y_train"])),
        test=(tensor(arrays["x_test"]), tensor(arrays["y_test"])),
        input_shape=tuple(x.shape[1:]),
        classes=len(names),
        names=tuple(names),
        source=source,
        fingerprint=digest or images.fingerprint(arrays, names),
        mean=tuple(mean.tolist()),
        std=tuple(np.where(std > 0, std, 1.0).tolist()),
        flip=flip,
    )


def load_digits(source: str, path: str) -> Data:
    """scikit-learn's 1,797 digits of 8x8 pixels, values 0 to 16: 1,437 to train, 360 to test, stratified."""
    if path:
        raise ValueError(f"digits is embedded and takes no path; got {source!r}")
    try:
        from sklearn.datasets import load_digits as embedded
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ImportError("the digits need scikit-learn: pip install 'lowbit[lab]'") from e
    x, y = embedded(return_X_y=True)
    x = x.astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = train_test_split(x, y.astype(np.int64), test_size=360, stratify=y, random_state=0)
    arrays = dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))
    return classification(source, arrays, [str(c) for c in range(10)], flip=False)


def load_idx(source: str, path: str, flip: bool = False) -> Data:
    """A folder with the four files of MNIST and its relatives, plain or gzip.

    A test label file that is shorter than its images (a cut test set) is accepted with a warning: the images
    without labels are left out.
    """
    arrays: Arrays = {}
    folder = Path(path)
    for split, stem in (("train", "train"), ("test", "t10k")):
        pixels = archives.resolve(folder, f"{stem}-images-idx3-ubyte", f"{stem}-images.idx3-ubyte")
        labels = archives.resolve(folder, f"{stem}-labels-idx1-ubyte", f"{stem}-labels.idx1-ubyte")
        x, y = archives.read_idx(pixels, 3), archives.read_idx(labels, 1)
        if len(x) != len(y):
            if split == "train" or len(y) > len(x):
                raise ValueError(
                    f"{labels}: {len(y):,} labels for {len(x):,} images in {pixels.name}; "
                    "the files don't belong together"
                )
            warnings.warn(
                f"{labels}: only {len(y):,} labels for {len(x):,} test images; the rest is left out",
                stacklevel=3,
            )
            x = x[: len(y)]
        arrays |= {f"x_{split}": x[:, None], f"y_{split}": y.astype(np.int64)}
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(
            f"{folder}: training images are {arrays['x_train'].shape[2:]} and test images "
            f"{arrays['x_test'].shape[2:]}; the files don't belong together"
        )
    classes = int(arrays["y_train"].max()) + 1
    if arrays["y_test"].max() >= classes:
        raise ValueError(
            f"{folder}: test label {arrays['y_test'].max()} is not among the training labels "
            f"0 to {classes - 1}; the files don't belong together"
        )
    return classification(source, arrays, [str(c) for c in range(classes)], flip=flip)


def load_images(
    source: str,
    path: str,
    size: int | None = None,
    flip: bool = True,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Data:
    """A folder, .tar, .tar.gz or .zip with train/<class>/ and test/<class>/, or with <class>/ only.

    Options: `size` resizes all images; `flip` allows mirroring; `cache` is a folder, not the data's own,
    where the decoded images are kept; `progress` is called with (images done, images in all).
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    place = archives.find_archive(Path(path))
    if cache is None:
        return classification(source, *images.image_sets(place, size, progress), flip=flip)
    folder = Path(cache)
    beside = (place if place.is_dir() else place.parent).resolve()
    if folder.resolve().is_relative_to(beside):
        raise ValueError(f"cache {folder} lies in the data's folder {beside}; put it into the folder of the run")
    file = folder / f"images-{images.content_key(place, size)}.safetensors"
    found = images.read_cache(file)
    if found is not None:
        return classification(source, *found, flip=flip)
    arrays, names = images.image_sets(place, size, progress)
    digest = images.write_cache(file, arrays, names)
    return classification(source, arrays, names, digest, flip=flip)


def load_text(source: str, path: str, block: int = 128) -> Data:
    """A UTF-8 file, or a folder with input.txt, as characters: the first 90 % to train, the rest to test.

    The vocabulary is the sorted set of all characters. Option: `block`, the length of a window.
    """
    file = Path(path)
    file = archives.resolve(file, "input.txt") if file.is_dir() else file
    text = archives.read_text(file)
    letters, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    cut = len(tokens) * 9 // 10
    if block < 1 or len(tokens) - cut < 2 or cut <= block or len(letters) < 2:
        raise ValueError(
            f"{file}: {len(tokens)} characters, {len(letters)} different, are too few for windows of "
            f"{block}; lower block or take a longer text"
        )
    arrays = {"train": tokens[:cut].astype(np.int32), "test": tokens[cut:].astype(np.int32)}
    names = [chr(c) for c in letters]
    return Data(
        task="lm",
        train=(tensor(arrays["train"]),),
        test=(tensor(arrays["test"]),),
        input_shape=(block,),
        classes=len(names),
        names=tuple(names),
        source=source,
        fingerprint=images.fingerprint(arrays, names),
    )


def load_pairs(
    source: str,
    path: str,
    languages: tuple[str, str] = ("en", "de"),
    test: str = "test_2016_flickr",
    min_count: int = 3,
    length: int = 48,
) -> Data:
    """A folder with train.<language> and <test>.<language>, plain or gzip, line i of one language pairs with
    line i of the other (the layout of Multi30k).

    Both languages share one vocabulary, as in Vaswani et al. (2017): PAD, BOS, EOS, UNK, then the words (see
    `words`) with at least `min_count` occurrences in the training sentences of both, by falling count, ties
    by spelling.
    Options: `languages` from and to; `test`, the name of the test split ("val" to tune); `length`, the most
    tokens of a sentence with its EOS, longer ones are cut.
    """
    if len(languages) != 2 or length < 2 or min_count < 1:
        raise ValueError(
            f"pairs needs 2 languages, length >= 2 and min_count >= 1; got {languages}, {length}, {min_count}"
        )
    folder = Path(path)
    texts: dict[str, list[list[list[str]]]] = {}
    for split, stem in (("train", "train"), ("test", test)):
        files = [archives.resolve(folder, f"{stem}.{language}") for language in languages]
        texts[split] = [[words(line) for line in archives.read_lines(file)] for file in files]
        first, second = map(len, texts[split])
        if first != second:
            raise ValueError(
                f"{folder}: {files[0].name} has {first:,} lines and {files[1].name} {second:,}; "
                "line i of one must pair with line i of the other"
            )
    counts = Counter(word for side in texts["train"] for sentence in side for word in sentence)
    kept = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *kept]
    index = {word: i for i, word in enumerate(names)}
    arrays: Arrays = {}
    for split, sides in texts.items():
        for side, sentences in zip(("source", "target"), sides, strict=True):
            rows = np.full((len(sentences), length), PAD, np.int32)
            for row, sentence in zip(rows, sentences, strict=True):
                codes = [index.get(word, UNK) for word in sentence[: length - 1]] + [EOS]
                row[: len(codes)] = codes
            arrays[f"{split}_{side}"] = rows
    return Data(
        task="translation",
        train=(tensor(arrays["train_source"]), tensor(arrays["train_target"])),
        test=(tensor(arrays["test_source"]), tensor(arrays["test_target"])),
        input_shape=(2, length),
        classes=len(names),
        names=tuple(names),
        source=source,
        fingerprint=images.fingerprint(arrays, names),
    )


SOURCES: dict[str, Callable[..., Data]] = {
    "digits": load_digits,
    "mnist": load_idx,
    "idx": load_idx,
    "images": load_images,
    "cifar10": load_images,
    "text": load_text,
    "pairs": load_pairs,
}
"""Loaders `(source, path, **options) -> Data` by the word before the colon."""


def without_place(source: str) -> str:
    """A source, or another word, as it may be shown: without the place of files on this machine."""
    kind, colon, path = source.partition(":")
    return f"{kind}:PATH" if colon and os.sep in path else source


def load(source: str, **options: Any) -> Data:
    """Read a data set.

    Args:
        source: "digits", or a kind and a path: "mnist:PATH" or "idx:PATH", "cifar10:PATH" or "images:PATH",
            "text:PATH", "pairs:PATH".
        options: of that kind, see the loaders in `SOURCES`. `cache` and `progress` may be given for every
            kind; the kinds that need no cache ignore them.

    Raises:
        ValueError: unknown kind or option, or a file that is damaged, hostile or of another format.
        FileNotFoundError: nothing there.
    """
    kind, _, path = source.partition(":")
    if kind not in SOURCES:
        raise ValueError(f"unknown data source {source!r}; {nearest(kind, SOURCES)}")
    if kind != "digits" and not path:
        raise ValueError(f"data source {kind!r} needs a path: {kind}:PATH")
    allowed = list(inspect.signature(SOURCES[kind]).parameters)[2:]
    for option in options:
        if option not in (*allowed, "cache", "progress"):
            raise ValueError(
                f"{kind} data has no option {option!r}; {nearest(option, [*allowed, 'cache', 'progress'])}"
            )
    path = str(Path(path).expanduser()) if path else path
    return SOURCES[kind](source, path, **{k: v for k, v in options.items() if k in allowed})
