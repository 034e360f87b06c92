"""`Data`, a data set in memory, and its batches.

The batches are a pure function of (seed, epoch, step), whatever other random numbers the program draws, so
that a resumed run sees what the original would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.serial import nearest

__all__ = ["BOS", "EOS", "IGNORE", "PAD", "UNK", "Data", "crop_and_flip"]

PAD, BOS, EOS, UNK = range(4)
"""Special tokens of `pairs`."""
IGNORE = -100
"""Target of a position that does not count; the default `ignore_index` of `cross_entropy`."""
CROP = 4
"""Pixels of zero padding around an image before its random crop (He et al., 2016, section 4.2)."""
CROP_FROM = 28
"""Smaller images are not augmented: 4 of 8 pixels would be too many."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in memory."""

    task: str
    """"classification", "lm" (language model) or "translation"."""
    train: tuple[Tensor, ...]
    """classification: images uint8 (n, C, H, W) and labels int64 (n,); lm: tokens int32 (n,); translation:
    source and target int32 (n, length), each sentence ending in EOS and filled with PAD."""
    test: tuple[Tensor, ...]
    """The same for the test split."""
    input_shape: tuple[int, ...]
    """Shape of one example of a batch: (C, H, W), (block,) or (2, length)."""
    classes: int
    """Number of classes, or size of the vocabulary."""
    names: tuple[str, ...]
    """Class names, characters or words, one for each class."""
    source: str
    """What `load` was asked for."""
    fingerprint: str
    """SHA-256 (hex) of the tensors and names above."""
    mean: tuple[float, ...] = ()
    """Per channel, over the training images, in units of their uint8 values; empty for sequences."""
    std: tuple[float, ...] = ()
    """The same; 1 for a channel that is constant."""
    flip: bool = False
    """Whether a mirrored image is still of its class: off for written digits."""

    def steps(self, batch_size: int, limit: int | None = None, split: str = "train") -> int:
        """Number of batches that `batches` gives for an epoch.

        Args:
            batch_size: examples in a batch.
            limit: use at most this many examples; None is all.
            split: "train", where a last partial batch is dropped, or "test", where it is kept.

        Raises:
            ValueError: an unknown split, sizes below 1, or not one full training batch.
        """
        count = self._examples(split)
        for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        count = min(count, limit or count)
        if split == "test":
            return math.ceil(count / batch_size)
        if batch_size > count:
            raise ValueError(
                f"{self.source}: {count} training examples don't fill a batch of {batch_size}; "
                "lower batch_size or raise limit"
            )
        return count // batch_size

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        augment: bool = False,
        limit: int | None = None,
        device: torch.device | str | None = None,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The (x, y) of one epoch.

        The loss of every task is `cross_entropy(model(x).flatten(0, -2), y.flatten())`.

        classification: x float32 (batch, C, H, W), normalised with `mean` and `std`; y int64 (batch,).
        lm: x, y int64 (batch, block), y one character later. Training windows start anywhere; test windows
        follow one another, and the last is filled with x = 0, y = `IGNORE`.
        translation: x int64 (batch, 2, n), source and target with a BOS before it; y int64 (batch, n), the
        target, `IGNORE` where it is filled; n is the longest sentence of the batch, rounded up to a multiple
        of 8.

        Args:
            split: "train": shuffled, a last partial batch dropped; "test": in order and complete.
            batch_size: examples in a batch.
            seed: of the run.
            epoch: each one has an order and windows of its own.
            augment: random crops from images padded by 4 zero pixels, and mirroring where `flip` is set; only
                for training images of 28 pixels and more.
            limit: at most this many examples: the first ones of the epoch's order.
            device: where the batches go; None leaves them on the CPU.
            start: first step to give, to continue inside an epoch.

        Raises:
            ValueError: an unknown split, sizes below 1, or not one full training batch.
        """
        steps = self.steps(batch_size, limit, split)
        if min(seed, epoch, start) < 0:
            raise ValueError(f"seed, epoch and start can't be negative; got {seed}, {epoch}, {start}")
        return self._batches(split, batch_size, seed, epoch, augment, limit, device, start, steps)

    def _examples(self, split: str) -> int:
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r}; {nearest(split, ('train', 'test'))}")
        tensors = self.train if split == "train" else self.test
        if self.task != "lm":
            return len(tensors[0])
        windows = (len(tensors[0]) - 1) / self.input_shape[0]  # the last token is only a target
        return math.ceil(windows) if split == "test" else int(windows)

    def _batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        epoch: int,
        augment: bool,
        limit: int | None,
        device: torch.device | str | None,
        start: int,
        steps: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        count = self._examples(split)
        shuffle = split == "train"
        order = generator(seed, epoch).permutation(count) if shuffle else np.arange(count)
        order = order[: limit or count]
        for step in range(start, steps):
            rng = generator(seed, epoch, step)
            index = torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])
            if self.task == "lm":
                x, y = self._windows(split, index, rng if shuffle else None)
            elif self.task == "translation":
                x, y = self._pairs(split, index)
            else:
                x, y = (tensor[index] for tensor in (self.train if shuffle else self.test))
                if augment and shuffle and min(x.shape[2:]) >= CROP_FROM:
                    shift = torch.from_numpy(rng.integers(0, 2 * CROP + 1, (2, len(x))))
                    mirror = torch.from_numpy(rng.integers(0, 2, len(x)) == 1) & self.flip
                    x = crop_and_flip(x, shift[0], shift[1], mirror)
            x, y = x.to(device), y.to(device)
            yield (self.normalise(x) if self.task == "classification" else x), y

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (batch, C, H, W) -> float32, (value - mean) / std per channel."""
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (images.float() - mean) / std

    def _windows(self, split: str, index: Tensor, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        (tokens,) = self.train if split == "train" else self.test
        (block,) = self.input_shape
        last = len(tokens) - 1
        starts = index * block if rng is None else torch.from_numpy(rng.integers(0, last - block + 1, len(index)))
        at = starts[:, None] + torch.arange(block)  # (batch, block)
        inside = at < last
        at = at.clamp_max(last - 1)
        return tokens[at].long() * inside, torch.where(inside, tokens[at + 1].long(), IGNORE)

    def _pairs(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        source, target = (tensor[index].long() for tensor in (self.train if split == "train" else self.test))
        longest = int(torch.stack([source, target]).ne(PAD).sum(-1).max())
        n = min(-(-longest // 8) * 8, source.shape[1])
        source, target = source[:, :n], target[:, :n]
        shifted = torch.cat([torch.full_like(target[:, :1], BOS), target[:, :-1]], dim=1)
        return torch.stack([source, shifted], dim=1), target.masked_fill(target == PAD, IGNORE)


def generator(*key: int) -> np.random.Generator:
    """Random numbers of their own for (seed, epoch) and for (seed, epoch, step)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key[0], spawn_key=key[1:])))


def crop_and_flip(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor) -> Tensor:
    """Pad by `CROP` zeros, cut the original size at (down, right), then mirror left-right where asked.

    Args:
        images: (batch, C, H, W), any dtype.
        down, right: int64 (batch,), 0 to 2 * CROP; CROP leaves the image where it was.
        mirror: bool (batch,).
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (CROP, CROP, CROP, CROP))
    rows = down[:, None] + torch.arange(height)  # (batch, H)
    columns = torch.arange(width).expand(batch, width)
    columns = right[:, None] + torch.where(mirror[:, None], width - 1 - columns, columns)  # (batch, W)
    one = torch.arange(batch)[:, None, None, None]
    return padded[one, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
