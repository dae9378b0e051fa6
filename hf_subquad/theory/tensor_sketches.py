"""Sketches of Kronecker products h (x) b that never form them: TensorSketch and TensorSRHT.

Both map R^(d1 d2) to R^s linearly and keep inner products in expectation, so for s large enough they embed the span
of n rows. The sketch of h (x) b is `join(left(h), right(b))`; where one factor stays the same, its half is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CountSketch:
    """Coordinate k is added to bucket[k] of s with sign[k] (Charikar, Chen, Farach-Colton 2002).

    Attributes:
        bucket: int64 [d].
        sign: +-1 [d].
    """

    bucket: Tensor
    sign: Tensor
    size: int

    @classmethod
    def draw(cls, width: int, size: int, generator: torch.Generator, like: Tensor) -> "CountSketch":
        """With signs in the dtype and on the device of `like`; numbers are drawn on the CPU."""
        bucket = torch.randint(size, (width,), generator=generator).to(like.device)
        return cls(bucket, random_signs(width, generator, like), size)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, d] to [N, s], in the dtype of the signs."""
        return self.sign.new_zeros(len(x), self.size).index_add_(1, self.bucket, x * self.sign)


@dataclass(frozen=True)
class TensorSketch:
    """Circular convolution of two count sketches, by FFT (Pagh 2013; Pham and Pagh 2013).

    If S U^T [s, n] is the sketch of n orthonormal rows U, E ||(S U^T)^T S U^T - I||_F^2 <= 11 n^2 / s (Avron, Nguyen,
    Woodruff 2014). A row costs nnz(h) + nnz(b) + s log s.
    """

    first: CountSketch
    second: CountSketch

    @classmethod
    def draw(cls, d1: int, d2: int, size: int, generator: torch.Generator, like: Tensor) -> "TensorSketch":
        return cls(*(CountSketch.draw(width, size, generator, like) for width in (d1, d2)))

    def left(self, h: Tensor) -> Tensor:
        return torch.fft.rfft(self.first(h))

    def right(self, b: Tensor) -> Tensor:
        return torch.fft.rfft(self.second(b))

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """[N, s]."""
        return torch.fft.irfft(left * right, n=self.first.size)


@dataclass(frozen=True)
class TensorSRHT:
    """s sampled entries of (H D1 h) (x) (H D2 b), with Hadamard H and random signs D (Ahle et al. 2020).

    A row costs m log m for each factor, whatever its sparsity.

    Attributes:
        signs: of D1 [d1] and D2 [d2].
        entries: int64 [s] each, which row of H D1 h and of H D2 b an entry multiplies.
    """

    signs: tuple[Tensor, Tensor]
    entries: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, d1: int, d2: int, size: int, generator: torch.Generator, like: Tensor) -> "TensorSRHT":
        signs = tuple(random_signs(width, generator, like) for width in (d1, d2))
        entries = tuple(
            torch.randint(padded(width), (size,), generator=generator).to(like.device) for width in (d1, d2)
        )
        return cls(signs, entries)  # type: ignore[arg-type]

    def left(self, h: Tensor) -> Tensor:
        return walsh_hadamard(h * self.signs[0])[:, self.entries[0]]

    def right(self, b: Tensor) -> Tensor:
        return walsh_hadamard(b * self.signs[1])[:, self.entries[1]]

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """[N, s]."""
        return left * right / len(self.entries[0]) ** 0.5


def walsh_hadamard(x: Tensor) -> Tensor:
    """Rows of x [N, d], padded with zeros to a power of two, times the Hadamard matrix of +-1: d log d a row."""
    width = padded(x.shape[1])
    x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
    step = 1
    while step < width:
        even, odd = x.view(len(x), -1, 2, step).unbind(2)
        x = torch.stack([even + odd, even - odd], 2).view(len(x), width)
        step *= 2
    return x


def padded(width: int) -> int:
    """The smallest power of two that is at least `width`."""
    return 1 << (width - 1).bit_length()


def random_signs(width: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(2, (width,), generator=generator).to(like) * 2 - 1
