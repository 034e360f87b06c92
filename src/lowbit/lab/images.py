"""Class folders of JPEG and PNG files, from a folder or an archive, as one array; and a cache of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.lab.archives import MAX_TOTAL, read_members

__all__ = ["MAX_PIXELS", "content_key", "fingerprint", "image_sets", "read_cache", "write_cache"]

MAX_PIXELS = 1 << 24
"""Pixels of one image, 4096 x 4096."""
CACHE_VERSION = 1
"""Part of every cache key; raised when the decoded form changes."""

Arrays = dict[str, Any]
Progress = Callable[[int, int], None]


def split_names(path: Path, files: list[str], folders: set[str]) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """For "train" and "test" the sorted (name, class index), and the class names.

    Folders that everything lies in are skipped. `train/<class>/` and `test/<class>/` are taken as they are;
    without them the folders are classes, and of each class every tenth image in the order of names (the 10th,
    20th, ...) is for the test.

    Raises:
        ValueError: another structure, a class without images, or one that only one split has.
    """
    parts = [name.split("/") for name in files]
    skip = 0
    while min(len(p) for p in parts) > skip + 2 and len({p[skip] for p in parts}) == 1:
        skip += 1
    top = {p[skip] for p in parts if len(p) > skip + 1}
    layout = "needs train/<class>/ and test/<class>/, or <class>/ folders of images"
    divided = "train" in top or "test" in top
    if divided and top != {"train", "test"}:
        raise ValueError(f"{path}: {layout}; found {', '.join(sorted(top)[:8])}")
    depth = skip + divided
    if any(len(p) != depth + 2 for p in parts):
        odd = next("/".join(p) for p in parts if len(p) != depth + 2)
        raise ValueError(f"{path}: {layout}; found {odd}")
    names = sorted({p[depth] for p in parts})
    groups: dict[tuple[str, str], list[str]] = {}
    for name, p in sorted(zip(files, parts, strict=True)):
        groups.setdefault((p[skip] if divided else "", p[depth]), []).append(name)
    for folder in sorted(folders):
        p = folder.split("/")
        if len(p) == depth + 1 and p[:skip] == parts[0][:skip] and (p[skip] if divided else "", p[depth]) not in groups:
            raise ValueError(f"{path}: class folder {folder}/ has no images; remove it or fill it")
    split: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for index, label in enumerate(names):
        if not divided:
            members = groups["", label]
            split["test"] += [(name, index) for name in members[9::10]]
            split["train"] += [(name, index) for i, name in enumerate(members) if i % 10 != 9]
            continue
        for part in ("train", "test"):
            if (part, label) not in groups:
                raise ValueError(f"{path}: class {label!r} has no images in {part}/; remove it or fill it")
            split[part] += [(name, index) for name in groups[part, label]]
    if len(names) < 2:
        raise ValueError(f"{path}: only one class ({names[0]}); {layout}")
    if not split["test"]:
        raise ValueError(f"{path}: no class has 10 images, so none is left for the test; add a test/ folder")
    return split, names


def decode(path: Path, name: str, content: bytes, size: int | None) -> np.ndarray:
    """An image file as uint8, (height, width) when it is grey and (height, width, 3) otherwise.

    Raises:
        ValueError: no JPEG or PNG, damaged, or more than `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:  # the header alone has been read so far
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ValueError(f"mode {image.mode} has more than 8 bits")
            grey = image.mode in ("1", "L", "LA")
            pixels = image.convert("L" if grey else "RGB")
            if size is not None:
                pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(pixels)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, zlib.error) as e:
        raise ValueError(f"{path}: image {name} can't be decoded ({e}); replace or remove it") from e


def image_sets(
    path: Path, size: int | None = None, progress: Progress | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Decode a folder or an archive of class folders.

    Args:
        path: a folder, a .tar, .tar.gz or .zip.
        size: resize every image to `size` x `size` (bilinear); None demands equal sizes.
        progress: called as (images done, images in all) now and then.

    Returns:
        `x_train`, `x_test` uint8 (n, C, H, W), C = 1 when every image is grey and 3 otherwise; `y_train`,
        `y_test` int64 (n,); and the class names, sorted.

    Raises:
        FileNotFoundError, ValueError: see `read_members`, `split_names`, `decode`; images of unequal sizes.
    """
    files, folders = read_members(path)
    split, names = split_names(path, list(files), folders)
    order = split["train"] + split["test"]
    images: list[Any] = []
    first = ""
    for done, (name, _) in enumerate(order):
        image = decode(path, name, files.pop(name), size)
        if not images:
            first = name
            if len(order) * image.shape[0] * image.shape[1] * 3 > MAX_TOTAL:
                raise ValueError(
                    f"{path}: {len(order):,} images like {name} are more than {MAX_TOTAL:,} bytes; give a smaller size="
                )
        elif image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"{path}: {first} has {images[0].shape[:2]} pixels and {name} {image.shape[:2]}; "
                "give size= to resize them all"
            )
        images.append(image)
        if progress and done % 500 == 0:
            progress(done, len(order))
    if progress:
        progress(len(order), len(order))
    channels = 3 if any(image.ndim == 3 for image in images) else 1
    pixels = np.empty((len(images), channels, *images[0].shape[:2]), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    labels = np.array([label for _, label in order], np.int64)
    n = len(split["train"])
    return {"x_train": pixels[:n], "y_train": labels[:n], "x_test": pixels[n:], "y_test": labels[n:]}, names


def fingerprint(arrays: Arrays, names: list[str]) -> str:
    """SHA-256 over name, dtype, shape and content of every array, and over the names."""
    digest = hashlib.sha256(json.dumps(names).encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def content_key(place: Path, size: int | None) -> str:
    """A short key of an archive (path, size, time) or a folder (the same for every file in it)."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {size} {place.resolve()}".encode())
    for file in [place] if place.is_file() else sorted(place.rglob("*")):
        if file.is_file():
            info = file.stat()
            digest.update(f"\n{file} {info.st_size} {info.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def read_cache(file: Path) -> tuple[Arrays, list[str], str] | None:
    """What `write_cache` wrote, or None when it is absent or its content is not what it was."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as store:
            arrays = {key: store.get_tensor(key) for key in store.keys()}
            about = json.loads((store.metadata() or {})["lowbit"])
        names, digest = [str(name) for name in about["names"]], about["fingerprint"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        return None
    return (arrays, names, digest) if fingerprint(arrays, names) == digest else None


def write_cache(file: Path, arrays: Arrays, names: list[str]) -> str:
    """Keep decoded images; returns their fingerprint.

    A temporary file is written and renamed, so that a reader never meets half of one. A folder that
    can't be written to costs only a warning: the images are decoded.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    digest = fingerprint(arrays, names)
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".part")
        os.close(handle)
        about = json.dumps({"names": names, "fingerprint": digest})
        save_file({key: np.ascontiguousarray(a) for key, a in arrays.items()}, temporary, {"lowbit": about})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as e:
        warnings.warn(
            f"the decoded images can't be kept in {file.parent} ({e}); give another cache folder",
            stacklevel=4,
        )
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return digest
