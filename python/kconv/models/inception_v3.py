"""Inception V3, and kInception V3 with grouped pointwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from kconv.models.builder import GraphBuilder
from kconv.models.graph import Graph, Padding, Shape
from kconv.models.options import KTypeOption
from kconv.models.spec import Spec, register

__all__ = ["InceptionV3", "KInceptionV3"]


@dataclass(frozen=True, kw_only=True)
class InceptionV3(Spec):
    """Inception V3 (Szegedy et al., 2016)."""

    def graph(self) -> Graph:
        """The network's layers."""
        g = _Inception(self.name, self.input_shape, self._ktype())
        x = g.unit(None, g.input, 32, 3, strides=2, padding="valid")
        x = g.unit(None, x, 32, 3, padding="valid")
        x = g.unit(None, x, 64, 3)
        x = g.pool(None, x, "max", 3, 2)
        x = g.grouped("single_path", x, 80)
        x = g.unit(None, x, 192, 3, padding="valid")
        x = g.pool(None, x, "max", 3, 2)
        x = g.mixed_fives("mixed0", x, pooled=32, plain=("11c",), last="33cc")
        x = g.mixed_fives("mixed1", x, pooled=64, plain=(), last="33cc")
        x = g.mixed_fives("mixed2", x, pooled=64, plain=("11c", "avg11"), last="33bb")
        x = g.mixed_first_reduction("mixed3", x)
        for number, filters in ((4, 128), (5, 160), (6, 160), (7, 192)):
            x = g.mixed_sevens(f"mixed{number}", x, filters)
        x = g.mixed_second_reduction("mixed8", x)
        x = g.mixed_wide("mixed9", x)
        x = g.mixed_wide("mixed10", x)
        if self.pooling:
            x = g.global_pool(f"{self.pooling}_pool", x, self.pooling)
        if self.include_top:
            x = g.dense("predictions", x, self.classes)
        return g.build(x)

    def _ktype(self) -> str | int:
        return "conv"


@dataclass(frozen=True, kw_only=True)
class KInceptionV3(InceptionV3):
    """kInception V3: grouped pointwise convolutions (MENDEL 28(1), 2022).

    Attributes:
        ktype: the kType of the pointwise convolutions, three of which the original leaves alone.
    """

    ktype: KTypeOption = "D6_16ch"

    def _ktype(self) -> str | int:
        return self.ktype


class _Inception(GraphBuilder):
    """The network's modules. Names end in the kernel's shape and the path's letter."""

    def __init__(self, name: str, input_shape: Shape, ktype: str | int) -> None:
        super().__init__(name, input_shape)
        self._ktype = ktype

    def unit(
        self,
        name: str | None,
        x: str,
        filters: int,
        kernel_size: int | tuple[int, int],
        strides: int = 1,
        padding: Padding = "same",
    ) -> str:
        """Convolution, batch norm without gamma, relu."""
        x = self.conv(name and f"{name}_conv", x, filters, kernel_size, strides, padding=padding)
        x = self.batch_norm(name and f"{name}_bn", x, scale=False)
        return self.activation(name, x, "relu")

    def grouped(self, name: str, x: str, filters: int) -> str:
        """The same for a pointwise convolution, replaced as the kType says."""
        return self.pointwise(name, x, filters, self._ktype, activation="relu", scale=False)

    def mixed_fives(self, name: str, x: str, pooled: int, plain: tuple[str, ...], last: str) -> str:
        """Paths 1x1, 5x5, twice 3x3, and pooled; the ``plain`` pointwise units stay ordinary."""

        def pointwise(unit: str, source: str, filters: int) -> str:
            if unit in plain:
                return self.unit(f"{name}_{unit}", source, filters, 1)
            return self.grouped(f"{name}_{unit}", source, filters)

        a = pointwise("11a", x, 64)
        b = pointwise("11b", x, 48)
        b = self.unit(f"{name}_55b", b, 64, 5)
        c = pointwise("11c", x, 64)
        c = self.unit(f"{name}_33c", c, 96, 3)
        c = self.unit(f"{name}_{last}", c, 96, 3)
        average = self.pool(f"{name}_avg", x, "avg", 3, 1, "same")
        average = pointwise("avg11", average, pooled)
        return self.concat(name, [a, b, c, average])

    def mixed_first_reduction(self, name: str, x: str) -> str:
        """Halves the image: 3x3, twice 3x3, and pooled."""
        a = self.unit(f"{name}_33a", x, 384, 3, strides=2, padding="valid")
        b = self.grouped(f"{name}_11b", x, 64)
        b = self.unit(f"{name}_33b", b, 96, 3)
        b = self.unit(None, b, 96, 3, strides=2, padding="valid")
        largest = self.pool(f"{name}_max", x, "max", 3, 2)
        return self.concat(name, [a, b, largest])

    def mixed_sevens(self, name: str, x: str, filters: int) -> str:
        """Paths 1x1, 7x7, twice 7x7 (as 1x7 and 7x1), and pooled."""
        a = self.grouped(f"{name}_11a", x, 192)
        b = self.grouped(f"{name}_11b", x, filters)
        b = self.unit(f"{name}_17b", b, filters, (1, 7))
        b = self.unit(f"{name}_71b", b, 192, (7, 1))
        c = self.grouped(f"{name}_11c", x, filters)
        c = self.unit(f"{name}_71c", c, filters, (7, 1))
        c = self.unit(f"{name}_17c", c, filters, (1, 7))
        c = self.unit(f"{name}_71cc", c, filters, (7, 1))
        c = self.unit(f"{name}_17cc", c, 192, (1, 7))
        average = self.pool(f"{name}_avg", x, "avg", 3, 1, "same")
        average = self.grouped(f"{name}_avg11", average, 192)
        return self.concat(name, [a, b, c, average])

    def mixed_second_reduction(self, name: str, x: str) -> str:
        """Halves the image: 3x3, 7x7 and 3x3, and pooled."""
        a = self.grouped(f"{name}_11a", x, 192)
        a = self.unit(f"{name}_33a", a, 320, 3, strides=2, padding="valid")
        b = self.grouped(f"{name}_11b", x, 192)
        b = self.unit(f"{name}_17b", b, 192, (1, 7))
        b = self.unit(f"{name}_71b", b, 192, (7, 1))
        b = self.unit(f"{name}_33b", b, 192, 3, strides=2, padding="valid")
        largest = self.pool(f"{name}_max", x, "max", 3, 2)
        return self.concat(name, [a, b, largest])

    def mixed_wide(self, name: str, x: str) -> str:
        """Paths 1x1, 3x3, twice 3x3 (1x3 beside 3x1), and pooled."""
        direct = self.grouped(f"{name}_11", x, 320)
        a = self.grouped(f"{name}_22", x, 384)
        a13 = self.unit(f"{name}_11a", a, 384, (1, 3))
        a31 = self.unit(f"{name}_31a", a, 384, (3, 1))
        a = self.concat(f"{name}_pa", [a13, a31])
        b = self.grouped(f"{name}_11b", x, 448)
        b = self.unit(f"{name}_33b", b, 384, 3)
        b13 = self.unit(f"{name}_13b", b, 384, (1, 3))
        b31 = self.unit(f"{name}_31b", b, 384, (3, 1))
        b = self.concat(f"{name}_pb", [b13, b31])
        average = self.pool(f"{name}_avg", x, "avg", 3, 1, "same")
        average = self.grouped(f"{name}_avg11", average, 192)
        return self.concat(name, [direct, a, b, average])


register("inception_v3", InceptionV3)
register("kinception_v3", KInceptionV3)
