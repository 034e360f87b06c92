"""Data sources: batches that depend on (seed, epoch, step) only, and files that are damaged or hostile."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.lab import archives, images
from lowbit.lab.data import BOS, EOS, IGNORE, PAD, SOURCES, UNK, Data, load, without_place, words
from lowbit.lab.dataset import CROP, crop_and_flip
from lowbit.lab.models import build

# Files made here


def png(value, side=8, mode="RGB", kind="PNG"):
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    pixels = (np.arange(np.prod(shape)).reshape(shape) * 7 + value * 31) % 256
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, kind)
    return out.getvalue()


def class_files(per_class=3, **options):
    return {
        f"{split}/{label}/{i}.png": png(i + 10 * len(label) + 5 * (split == "test"), **options)
        for split in ("train", "test")
        for label in ("cat", "zebra")
        for i in range(per_class)
    }


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path, files, mode="w", members=()):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root, n_train=40, n_test=10, side=28, packed=False, **replace):
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for stem, n in (("train", n_train), ("t10k", n_test)):
        contents = {
            f"{stem}-images-idx3-ubyte": idx_bytes(rng.integers(0, 256, (n, side, side), np.uint8)),
            f"{stem}-labels-idx1-ubyte": idx_bytes((np.arange(n) % 5).astype(np.uint8)),
        }
        for name, content in contents.items():
            content = replace.get(name.replace("-", "_"), content)
            (root / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return root


def write_pairs(root, train, test):
    root.mkdir()
    for split, sentences in (("train", train), ("test_2016_flickr", test)):
        for side, language in enumerate(("en", "de")):
            text = "".join(pair[side] + "\n" for pair in sentences)
            (root / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return root


def same(a: Data, b: Data) -> bool:
    pairs = zip(a.train + a.test, b.train + b.test, strict=True)
    return a.fingerprint == b.fingerprint and a.names == b.names and all(torch.equal(x, y) for x, y in pairs)


def collect(data, split="train", **options):
    return [(x.clone(), y.clone()) for x, y in data.batches(split, **{"batch_size": 8, **options})]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, digits):
    """One small data set of each task, and one with images large enough to augment."""
    root = tmp_path_factory.mktemp("sources")
    text = root / "t.txt"
    text.write_text("".join("abcdefghij"[i * i % 10] for i in range(1000)), encoding="utf-8")
    pairs = write_pairs(
        root / "pairs", [(f"a man {'runs ' * (i % 5)}.", "ein Mann .") for i in range(40)], [("a", "b")]
    )
    return {
        "digits": digits,
        "idx": load(f"idx:{write_idx(root / 'idx')}", flip=True),
        "text": load(f"text:{text}", block=16),
        "pairs": load(f"pairs:{pairs}"),
    }


# Digits and the contract of batches


def test_digits(digits):
    x, y = digits.train
    assert x.shape == (1437, 1, 8, 8) and x.dtype == torch.uint8 and int(x.max()) == 16
    assert digits.test[0].shape == (360, 1, 8, 8) and y.dtype == torch.int64
    assert (digits.task, digits.input_shape, digits.classes) == ("classification", (1, 8, 8), 10)
    share = torch.bincount(y) / 1437 - torch.bincount(digits.test[1]) / 360
    assert share.abs().max() < 0.005  # stratified
    assert digits.mean[0] == pytest.approx(x.double().mean().item(), abs=1e-9)
    assert digits.std[0] == pytest.approx(x.double().std(correction=0).item(), abs=1e-9)
    assert len(digits.fingerprint) == 64 and digits.fingerprint == load("digits").fingerprint


def test_batches_are_normalised(digits):
    x = torch.cat([x for x, _ in digits.batches("train", 1437)])
    assert x.dtype == torch.float32
    assert x.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert x.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["digits", "idx", "text", "pairs"])
def test_batches_depend_on_seed_and_epoch_only(sources, kind):
    data = sources[kind]
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    first = collect(data, seed=3, epoch=1, augment=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    np.random.seed(99)
    assert equal(first, collect(data, seed=3, epoch=1, augment=True))
    assert not equal(first, collect(data, seed=3, epoch=2, augment=True))
    assert not equal(first, collect(data, seed=4, epoch=1, augment=True))
    assert equal(first[2:], collect(data, seed=3, epoch=1, augment=True, start=2))
    assert len(first) == data.steps(8)
    assert equal(collect(data, "test", seed=3), collect(data, "test", seed=4, epoch=7, augment=True))
    assert len(collect(data, "test")) == data.steps(8, split="test")


def test_training_drops_the_rest_and_testing_keeps_it(digits):
    train, test = collect(digits, batch_size=100), collect(digits, "test", batch_size=100)
    assert [len(y) for _, y in train] == [100] * 14
    assert [len(y) for _, y in test] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([y for _, y in test]), digits.test[1])
    whole = torch.cat([y for _, y in collect(digits, batch_size=1437)])
    assert torch.equal(whole.sort().values, digits.train[1].sort().values)  # every example once


def test_limit_takes_the_first_examples(digits):
    assert digits.steps(32, 100) == 3 and digits.steps(32, 100, "test") == 4 and digits.steps(32, 10**6) == 44
    assert equal(collect(digits, batch_size=32, limit=100), collect(digits, batch_size=32)[:3])
    assert sum(len(y) for _, y in collect(digits, "test", batch_size=32, limit=100)) == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"split": "tests"}, "did you mean 'test'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 2000}, "1437 training examples don't fill a batch of 2000; lower"),
        ({"batch_size": 64, "limit": 50}, "raise limit"),
        ({"seed": -1}, "can't be negative"),
    ],
)
def test_batches_refuse(digits, call, message):
    with pytest.raises(ValueError, match=message):  # at the call, before the first batch is asked for
        digits.batches(**{"split": "train", "batch_size": 8, **call})


# Augmentation


def slow_crop_and_flip(image, down, right, mirror):
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                column = width - 1 - j if mirror else j
                row, column = i + down - CROP, column + right - CROP
                if 0 <= row < height and 0 <= column < width:
                    out[c, i, j] = image[c, row, column]
    return out


def test_crop_and_flip_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 2, 9, 7), generator=g).byte()
    down, right = torch.randint(0, 2 * CROP + 1, (2, 12), generator=g)
    mirror = torch.arange(12) % 2 == 1
    down[:2] = right[:2] = CROP  # one image unchanged, one mirrored only
    y = crop_and_flip(x, down, right, mirror)
    assert y.dtype == torch.uint8 and torch.equal(y[0], x[0]) and torch.equal(y[1], x[1].flip(-1))
    for i in range(12):
        assert torch.equal(y[i], slow_crop_and_flip(x[i], int(down[i]), int(right[i]), bool(mirror[i])))


def test_augmentation_is_for_large_training_images(sources, digits):
    data = sources["idx"]
    assert not equal(collect(data, augment=True), collect(data))
    assert equal(collect(data, "test", augment=True), collect(data, "test"))
    assert equal(collect(digits, augment=True), collect(digits))


def test_every_shift_is_drawn_and_mirroring_obeys_flip(tmp_path):
    """Images with one white pixel show where each one went."""
    x = np.zeros((2000, 28, 28), np.uint8)
    x[:, 14, 10] = 255
    root = write_idx(tmp_path / "d", n_train=2000, train_images_idx3_ubyte=idx_bytes(x))
    for flip in (False, True):
        data = load(f"idx:{root}", flip=flip)
        (batch, _), *_ = data.batches("train", 2000, augment=True)
        where = batch[:, 0].flatten(1).argmax(1)
        rows, columns = where // 28, where % 28
        assert sorted(set(rows.tolist())) == list(range(10, 19))
        right = {*range(6, 15), *range(13, 22)} if flip else set(range(6, 15))
        assert set(columns.tolist()) == right
        share = (columns > 14).float().mean().item()  # mirrored columns 13..21, of which 7 in 9 are above 14
        assert share == pytest.approx(7 / 18 if flip else 0, abs=0.07)


# idx


@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, packed):
    root = write_idx(tmp_path / "d", packed=packed)
    data = load(f"mnist:{root}")
    rng = np.random.default_rng(0)
    assert np.array_equal(data.train[0][:, 0].numpy(), rng.integers(0, 256, (40, 28, 28), np.uint8))
    assert np.array_equal(data.test[0][:, 0].numpy(), rng.integers(0, 256, (10, 28, 28), np.uint8))
    assert data.train[1].tolist() == [i % 5 for i in range(40)]
    assert data.classes == 5 and data.input_shape == (1, 28, 28) and not data.flip


def test_idx_labels_cut_short(tmp_path):
    labels = idx_bytes(np.zeros(7, np.uint8))
    with pytest.warns(UserWarning, match="only 7 labels for 10 test images"):
        data = load(f"idx:{write_idx(tmp_path / 'd', t10k_labels_idx1_ubyte=labels)}")
    assert len(data.test[0]) == len(data.test[1]) == 7


BAD_IDX = {
    "magic": ("train_images", b"\x00\x00\x0d\x03" + bytes(12), "starts with 00000d03"),
    "swapped": ("train_labels", idx_bytes(np.zeros((4, 2, 2), np.uint8)), "not swapped"),
    "empty": ("train_images", b"", "starts with nothing"),
    "header": ("train_images", b"\x00\x00\x08\x03\x00\x00", "ends inside its header"),
    "negative": ("train_images", b"\x00\x00\x08\x03" + struct.pack(">iii", -1, 28, 28), "impossible sizes"),
    "huge": ("train_images", b"\x00\x00\x08\x03" + struct.pack(">III", 2**30, 2**30, 9), "impossible sizes"),
    "short": ("train_images", idx_bytes(np.zeros((40, 28, 28), np.uint8))[:-1], "only 31,359"),
    "long": ("train_images", idx_bytes(np.zeros((40, 28, 28), np.uint8)) + b"x", "there are more"),
    "fewer": ("train_labels", idx_bytes(np.zeros(39, np.uint8)), "39 labels for 40 images"),
    "more": ("t10k_labels", idx_bytes(np.zeros(11, np.uint8)), "11 labels for 10 images"),
    "unseen": ("t10k_labels", idx_bytes(np.full(10, 9, np.uint8)), "test label 9"),
    "sizes": ("t10k_images", idx_bytes(np.zeros((10, 8, 8), np.uint8)), "don't belong together"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BAD_IDX)
def test_damaged_idx(tmp_path, case, packed):
    stem, content, message = BAD_IDX[case]
    name = stem + ("_idx3_ubyte" if stem.endswith("images") else "_idx1_ubyte")
    root = write_idx(tmp_path / "d", packed=packed, **{name: content})
    with pytest.raises(ValueError, match=message) as e:
        load(f"idx:{root}")
    assert str(root) in str(e.value)


def test_damaged_gzip_and_missing_idx(tmp_path):
    root = write_idx(tmp_path / "d", packed=True)
    file = root / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for cut in (content[:-3], content[:1000], content[:-8] + bytes(8)):  # trailer, middle, wrong checksum
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="train-images.*gzip"):
            load(f"idx:{root}")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="needs a file train-images-idx3-ubyte"):
        load(f"idx:{root}")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(f"idx:{tmp_path / 'none'}")


# Images


def test_folder_tar_and_zip_are_equal(tmp_path):
    files = class_files()
    folder = load(f"images:{write_folder(tmp_path / 'f', files)}")
    assert folder.names == ("cat", "zebra") and folder.input_shape == (3, 8, 8) and folder.flip
    assert folder.train[1].tolist() == [0, 0, 0, 1, 1, 1]
    want = np.asarray(Image.open(io.BytesIO(files["train/zebra/2.png"]))).transpose(2, 0, 1)
    assert np.array_equal(folder.train[0][5].numpy(), want)
    backwards = dict(reversed(files.items()))
    below = {f"top/inner/{name}": content for name, content in files.items()}
    noise = {"README.md": b"x", ".hidden/a.png": b"x", "__MACOSX/train/cat/._0.png": b"x"}
    places = [
        write_tar(tmp_path / "a.tar", backwards | noise),
        write_tar(tmp_path / "b.tar.gz", files, "w:gz"),
        write_tar(tmp_path / "c.tgz", below, "w:gz"),
        write_zip(tmp_path / "d.zip", backwards | noise),
        write_folder(tmp_path / "g", below | {"notes.txt": b"x"}),
    ]
    (tmp_path / "one").mkdir()
    places += [write_tar(tmp_path / "one" / "e.tar.gz", files, "w:gz").parent]
    for place in places:
        assert same(load(f"cifar10:{place}"), folder), place


def test_grey_colour_and_size(tmp_path):
    grey = load(f"images:{write_zip(tmp_path / 'grey.zip', class_files(mode='L'))}")
    assert grey.input_shape == (1, 8, 8)
    files = class_files(mode="L") | {"train/cat/9.png": png(1)}
    mixed = load(f"images:{write_zip(tmp_path / 'mixed.zip', files)}")
    assert mixed.input_shape == (3, 8, 8)
    assert torch.equal(mixed.train[0][0], grey.train[0][0].expand(3, 8, 8))
    files["train/cat/9.png"] = png(1, side=12)
    other = write_zip(tmp_path / "sizes.zip", files)
    with pytest.raises(ValueError, match=r"train/cat/0.png has \(8, 8\) pixels.*give size="):
        load(f"images:{other}")
    assert load(f"images:{other}", size=10).input_shape == (3, 10, 10)


def test_split_of_plain_class_folders(tmp_path):
    files = {f"{label}/{i:02}.jpg": png(i, kind="JPEG") for label in "ab" for i in range(25)}
    data = load(f"images:{write_folder(tmp_path / 'f', files)}")
    assert data.train[1].tolist() == [0] * 23 + [1] * 23 and data.test[1].tolist() == [0, 0, 1, 1]
    want = np.asarray(Image.open(io.BytesIO(files["a/09.jpg"]))).transpose(2, 0, 1)
    assert np.array_equal(data.test[0][0].numpy(), want)
    assert same(data, load(f"images:{write_tar(tmp_path / 'f.tar', files)}"))


def test_progress(tmp_path):
    calls = []
    load(f"images:{write_zip(tmp_path / 'a.zip', class_files())}", progress=lambda *at: calls.append(at))
    assert calls[-1] == (12, 12) and calls == sorted(calls)


def link(name, kind, target="../../etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE_TARS = {
    "parent": ({"../evil.png": b"x"}, (), "points outside"),
    "inner parent": ({"train/../../evil.png": b"x"}, (), "points outside"),
    "absolute": ({"/tmp/evil.png": b"x"}, (), "points outside"),
    "drive": ({"C:/evil.png": b"x"}, (), "points outside"),
    "backslash": ({"..\\evil.png": b"x"}, (), "points outside"),
    "symlink": ({}, (link("train/cat/l.png", tarfile.SYMTYPE),), "is a link"),
    "hard link": ({}, (link("train/cat/l.png", tarfile.LNKTYPE),), "is a link"),
    "device": ({}, (link("train/cat/d.png", tarfile.CHRTYPE),), "neither a file nor a folder"),
    "pipe": ({}, (link("train/cat/p.png", tarfile.FIFOTYPE),), "neither a file nor a folder"),
    "twice": ({"train/./cat/0.png": b"x"}, (), "appears twice"),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("case", HOSTILE_TARS)
def test_hostile_tar(tmp_path, case, mode):
    files, members, message = HOSTILE_TARS[case]
    (tmp_path / "in").mkdir()
    path = write_tar(tmp_path / "in" / "a.tar", class_files() | files, mode, members)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as e:
        load(f"images:{path}", cache=tmp_path / "cache")
    assert str(path) in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize("size", [-512, archives.MAX_FILE + 1, 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_tar_header_with_an_impossible_size(tmp_path, size, kind):
    info = tarfile.TarInfo("train/cat/0.png")
    info.size, info.type = size, kind
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ValueError, match=r"a\.tar.*claims"):
        load(f"images:{path}")


def test_damaged_archives(tmp_path):
    files = class_files()
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    packed = write_tar(tmp_path / "whole.tar.gz", files, "w:gz").read_bytes()
    zipped = write_zip(tmp_path / "whole.zip", files).read_bytes()
    flipped = bytearray(whole)
    flipped[1024 + 3] ^= 1  # in the name of the second header: its checksum is wrong
    cases = [whole[:700], whole[:1024], whole[:3000], bytes(flipped), packed[:-4], packed[:300], zipped[:-30]]
    cases += [zipped[:40] + b"\xff\xff" + zipped[42:], b"", b"plain text", packed[:-8] + bytes(8)]
    for i, content in enumerate(cases):
        path = tmp_path / f"case{i}.tar"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"case{i}\.tar"):
            load(f"images:{path}")


def test_hostile_zip(tmp_path):
    path = tmp_path / "a.zip"
    for name in ("../evil.png", "/evil.png", "a/../../evil.png"):
        write_zip(path, class_files() | {name: b"x"})
        with pytest.raises(ValueError, match="points outside"):
            load(f"images:{path}")
    write_zip(path, class_files())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/cat/l.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="is a link"):
        load(f"images:{path}")


def test_limits(tmp_path, monkeypatch):
    """With the limits lowered, so that the files stay small."""
    path = write_zip(tmp_path / "a.zip", class_files())
    bomb = write_zip(tmp_path / "b.zip", class_files() | {"train/cat/big.png": bytes(1 << 20)})
    with monkeypatch.context() as m:
        m.setattr(archives, "MAX_FILE", 1 << 19)
        with pytest.raises(ValueError, match="big.png.*claims 1,048,576 bytes"):
            load(f"images:{bomb}")
    with monkeypatch.context() as m:
        m.setattr(archives, "MAX_TOTAL", 1000)
        with pytest.raises(ValueError, match="1,000 bytes; use a part"):
            load(f"images:{path}")
    with monkeypatch.context() as m:
        m.setattr(archives, "MAX_MEMBERS", 5)
        with pytest.raises(ValueError, match="more than 5 members"):
            load(f"images:{path}")
    with monkeypatch.context() as m:
        m.setattr(images, "MAX_PIXELS", 63)
        with pytest.raises(ValueError, match="8x8 pixels, more than 63"):
            load(f"images:{path}")
    with monkeypatch.context() as m:
        m.setattr(images, "MAX_TOTAL", 1000)
        with pytest.raises(ValueError, match="smaller size="):
            load(f"images:{path}")
    text = tmp_path / "a.txt.gz"
    text.write_bytes(gzip.compress(bytes(5000)))
    with pytest.raises(ValueError, match="more than 4,000 bytes"):
        archives.read_file(text, limit=4000)


def test_image_bomb(tmp_path):
    """A PNG header that claims 60,000 x 60,000 pixels is refused before they are made."""
    content = bytearray(png(0))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = write_zip(tmp_path / "a.zip", class_files() | {"train/cat/big.png": bytes(content)})
    with pytest.raises(ValueError, match="a.zip: image train/cat/big.png can't be decoded"):
        load(f"images:{path}")


@pytest.mark.parametrize(
    "content", [b"", b"not an image", png(0)[:60], png(0, kind="GIF"), png(0, side=64, kind="JPEG")[:500]]
)
def test_damaged_image(tmp_path, content):
    path = write_zip(tmp_path / "a.zip", class_files() | {"train/cat/7.png": content})
    with pytest.raises(ValueError, match="a.zip: image train/cat/7.png can't be decoded"):
        load(f"images:{path}")


def test_deep_pixels_are_refused(tmp_path):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(out, "PNG")
    path = write_zip(tmp_path / "a.zip", class_files() | {"train/cat/7.png": out.getvalue()})
    with pytest.raises(ValueError, match="more than 8 bits"):
        load(f"images:{path}")


BAD_LAYOUTS = {
    "empty": ({}, "no images"),
    "text only": ({"train/cat/a.txt": b"x"}, "no images"),
    "no classes": ({"a.png": png(0), "b.png": png(1)}, "needs train/<class>/"),
    "one class": ({f"a/{i}.png": png(i) for i in range(20)}, "only one class"),
    "other splits": ({"train/a/0.png": png(0), "val/a/0.png": png(0)}, "found train, val"),
    "one sided": (class_files() | {"test/dog/0.png": png(0)}, "'dog' has no images in train/"),
    "stray": (class_files() | {"train/0.png": png(0)}, "found train/0.png"),
    "too few": ({f"{c}/{i}.png": png(i) for c in "ab" for i in range(9)}, "add a test/ folder"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_bad_layout(tmp_path, case):
    files, message = BAD_LAYOUTS[case]
    with pytest.raises(ValueError, match=message):
        load(f"images:{write_tar(tmp_path / 'a.tar', files)}")


def test_empty_class_and_choice_of_archives(tmp_path):
    root = write_folder(tmp_path / "f", class_files())
    (root / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match="train/ant/ has no images"):
        load(f"images:{root}")
    many = tmp_path / "many"
    many.mkdir()
    with pytest.raises(FileNotFoundError, match="neither class folders nor an archive"):
        load(f"images:{many}")
    for name in ("a.tar", "b.zip"):
        (many / name).write_bytes(b"")
    with pytest.raises(ValueError, match="2 archives.*name one"):
        load(f"images:{many}")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(f"images:{tmp_path / 'none'}")


# Cache


def test_cache_is_reused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "a.tar", class_files())
    cache = tmp_path / "run" / "cache"
    first = load(f"images:{path}", cache=cache)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["a.tar"]
    with monkeypatch.context() as m:
        m.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
        assert same(load(f"images:{path}", cache=str(cache)), first)
    assert same(load(f"images:{path}"), first)
    load(f"images:{path}", cache=cache, size=4)  # another key
    write_tar(path, class_files(per_class=4))
    assert len(load(f"images:{path}", cache=cache).train[0]) == 8
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_cache_is_replaced(tmp_path, damage):
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "a.tar", class_files())
    first = load(f"images:{path}", cache=tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"cut": content[:-5], "flip": content, "empty": b""}[damage])
    assert same(load(f"images:{path}", cache=tmp_path / "c"), first)
    assert images.read_cache(file) is not None


def test_cache_is_atomic(tmp_path, monkeypatch):
    """A write that stops half-way leaves no file, and costs a warning only."""
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "a.tar", class_files())

    def stops(*_):
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr(images.os, "replace", stops)
        with pytest.warns(UserWarning, match="no space left"):
            assert len(load(f"images:{path}", cache=tmp_path / "c").train[0]) == 6
    assert list((tmp_path / "c").iterdir()) == []


def test_cache_is_never_beside_the_data(tmp_path):
    path = write_tar(tmp_path / "a.tar", class_files())
    for source, cache in ((path, tmp_path / "cache"), (path, tmp_path)):
        with pytest.raises(ValueError, match="lies in the data's folder"):
            load(f"images:{source}", cache=cache)
    root = write_folder(tmp_path / "f", class_files())
    with pytest.raises(ValueError, match="lies in the data's folder"):
        load(f"images:{root}", cache=root / "train")


# Text


def test_text(tmp_path):
    text = "héllo\r\nwörld " * 100
    (tmp_path / "input.txt").write_bytes(text.encode())
    data = load(f"text:{tmp_path}", block=10)
    assert data.names == tuple(sorted(set(text))) and data.classes == len(data.names)
    both = torch.cat([data.train[0], data.test[0]])
    assert "".join(data.names[i] for i in both.tolist()) == text
    assert len(data.train[0]) == len(text) * 9 // 10 and data.input_shape == (10,)
    gz = tmp_path / "b.txt.gz"
    gz.write_bytes(gzip.compress(text.encode()))
    assert same(load(f"text:{gz}", block=10), data)


def test_text_windows(sources):
    data = sources["text"]
    (tokens,), (test,) = data.train, data.test
    windows = {tuple(tokens[i : i + 17].tolist()) for i in range(len(tokens) - 16)}
    for x, y in collect(data, seed=1):
        assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert all((*a, b[-1]) in windows for a, b in zip(x.tolist(), y.tolist(), strict=True))
    batches = collect(data, "test")
    x, y = (torch.cat([b[i] for b in batches]).flatten() for i in (0, 1))
    assert torch.equal(y[: len(test) - 1], test[1:].long()) and torch.equal(x[: len(test) - 1], test[:-1].long())
    assert (y[len(test) - 1 :] == IGNORE).all() and not x[len(test) - 1 :].any()
    assert len(y) == 112 and len(test) == 100  # 7 windows of 16


def test_text_errors(tmp_path):
    path = tmp_path / "a.txt"
    for content, message in (
        (b"abc\xff", "byte 3 is not UTF-8"),
        (b"", "too few"),
        (b"ab" * 50, "windows of 128"),
        (b"a" * 5000, "1 different"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as e:
            load(f"text:{path}")
        assert str(path) in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(f"text:{tmp_path / 'none.txt'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="input.txt"):
        load(f"text:{tmp_path / 'empty'}")


# Pairs


def test_words():
    assert words("Two Men's  hats, größer.\n") == ["two", "men", "'", "s", "hats", ",", "größer", "."]


def test_pairs(tmp_path):
    train = [("A dog runs.", "Ein Hund läuft."), ("A dog .", "Ein Hund ."), ("a cat", "eine Katze")]
    data = load(f"pairs:{write_pairs(tmp_path / 'p', train, [('A bird runs', 'Ein')])}", min_count=2, length=6)
    # counts: "." 4, "a" 3, then "dog", "ein", "hund" 2 each
    assert data.names == ("<pad>", "<bos>", "<eos>", "<unk>", ".", "a", "dog", "ein", "hund")
    assert data.task == "translation" and data.classes == 9 and data.input_shape == (2, 6)
    assert data.train[0].tolist() == [
        [5, 6, UNK, 4, EOS, PAD],
        [5, 6, 4, EOS, PAD, PAD],
        [5, UNK, EOS] + [PAD] * 3,
    ]
    assert data.train[1].tolist()[0] == [7, 8, UNK, 4, EOS, PAD]
    ((x, y),) = data.batches("test", 4)
    assert x.tolist() == [[[5, UNK, UNK, EOS, PAD, PAD], [BOS, 7, EOS, PAD, PAD, PAD]]]
    assert y.tolist() == [[7, EOS] + [IGNORE] * 4]
    short = load(f"pairs:{tmp_path / 'p'}", min_count=2, length=3)
    assert short.train[0].tolist()[0] == [5, 6, EOS]


def test_pair_batches_are_as_long_as_they_must(tmp_path):
    train = [("a " * (i % 20), "b " * (3 * i % 20)) for i in range(40)]
    data = load(f"pairs:{write_pairs(tmp_path / 'p', train, train)}", length=48)
    for x, y in collect(data, batch_size=2):
        longest = int((y != IGNORE).sum(1).max().maximum((x[:, 0] != PAD).sum(1).max()))
        assert x.shape == (2, 2, -(-longest // 8) * 8) and y.shape == (2, x.shape[2])
        assert torch.equal(x[:, 1, 1:][y[:, 1:] != IGNORE], y[:, :-1][y[:, 1:] != IGNORE])


def test_pairs_errors(tmp_path):
    root = write_pairs(tmp_path / "p", [("a", "b")] * 5, [("a", "b")])
    with pytest.raises(FileNotFoundError, match="train.fr"):
        load(f"pairs:{root}", languages=("en", "fr"))
    with pytest.raises(ValueError, match="length >= 2"):
        load(f"pairs:{root}", length=1)
    (root / "train.de.gz").write_bytes(gzip.compress(b"b\n" * 4))
    with pytest.raises(ValueError, match=r"train.en.gz has 5 lines and train.de.gz 4"):
        load(f"pairs:{root}")
    (root / "train.de.gz").write_bytes(gzip.compress(b"b\n\xff\n"))
    with pytest.raises(ValueError, match="train.de.gz: byte 2 is not UTF-8"):
        load(f"pairs:{root}")
    (root / "train.de.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="no lines"):
        load(f"pairs:{root}")


# load


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("cifar:x", {}, "did you mean 'cifar10'"),
        ("mnist", {}, "needs a path: mnist:PATH"),
        ("images:", {}, "needs a path"),
        ("digits:/x", {}, "takes no path"),
        ("digits", {"blok": 3}, "no option 'blok'"),
        ("text:x", {"blok": 3}, "did you mean 'block'"),
        ("images:x", {"size": 0}, "size must be at least 1"),
    ],
)
def test_load_refuses(source, options, message):
    with pytest.raises(ValueError, match=message):
        load(source, **options)


def test_load_takes_cache_and_progress_for_every_kind(digits, tmp_path):
    assert same(load("digits", cache=tmp_path / "c", progress=print), digits)
    assert not (tmp_path / "c").exists()
    assert set(SOURCES) == {"digits", "mnist", "idx", "images", "cifar10", "text", "pairs"}


def test_constant_channel_and_frozen(tmp_path):
    nines = idx_bytes(np.full((40, 28, 28), 9, np.uint8))
    data = load(f"idx:{write_idx(tmp_path / 'd', train_images_idx3_ubyte=nines)}")
    assert data.mean == (9.0,) and data.std == (1.0,)
    with pytest.raises(AttributeError):
        data.classes = 3


def test_learns_digits(digits):
    """Models, batches and loss fit together: two epochs of a small network read most of the test digits."""
    net = build("mlp", digits.input_shape, digits.classes, seed=0, hidden=(64,))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(3):
        for x, y in digits.batches("train", 32, seed=0, epoch=epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
    with torch.no_grad():
        right = sum(int((net(x).argmax(-1) == y).sum()) for x, y in digits.batches("test", 100))
    assert right / 360 > 0.93


# Real data


@pytest.mark.slow
def test_real_mnist(data_root):
    data = load(f"mnist:{data_root / 'mnist'}")
    assert data.train[0].shape == (60_000, 1, 28, 28) and len(data.test[0]) == len(data.test[1])
    assert data.mean[0] / 255 == pytest.approx(0.1307, abs=1e-4)
    assert data.std[0] / 255 == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.slow
def test_real_cifar10(data_root, tmp_path, monkeypatch):
    data = load(f"cifar10:{data_root / 'cifar10-jpeg'}", cache=tmp_path)
    assert data.train[0].shape == (50_000, 3, 32, 32) and data.test[0].shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.train[1]).tolist() == [5000] * 10
    assert data.names[:2] == ("airplane", "automobile") and data.mean[0] == pytest.approx(125.3, abs=0.3)
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    assert same(load(f"cifar10:{data_root / 'cifar10-jpeg'}", cache=tmp_path), data)


@pytest.mark.slow
def test_real_text_and_pairs(data_root):
    text = load(f"text:{data_root / 'shakespeare'}")
    assert text.classes == 65 and len(text.train[0]) == 1_003_854
    pairs = load(f"pairs:{data_root / 'multi30k'}")
    assert pairs.train[0].shape == (29_000, 48) and pairs.test[1].shape == (1000, 48)
    assert pairs.train[0][:, -1].eq(PAD).all() and pairs.train[1][:, -1].eq(PAD).all()  # none was cut


def test_sources_are_shown_without_their_place():
    shown = {"digits": "digits", "cifar10:/home/me/a.tar.gz": "cifar10:PATH", "text:../plays": "text:PATH"}
    shown |= {"--data=mnist:/data/mnist": "--data=mnist:PATH", "a/b": "a/b", "text:plays": "text:plays"}
    assert {source: without_place(source) for source in shown} == shown
