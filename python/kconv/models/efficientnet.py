"""EfficientNet B0-B7, and kEffNet: the same network with grouped pointwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import ClassVar, NamedTuple

from kconv.models.blocks import Pointwise, conv_unit, grouped, mbconv, plain
from kconv.models.builder import GraphBuilder, round_filters
from kconv.models.graph import Graph
from kconv.models.options import Elementwise, Factor, Integer, KTypePaths, Rate
from kconv.models.spec import Spec, register

__all__ = ["EfficientNet", "KEffNet"]


class Stage(NamedTuple):
    """One row of EfficientNet's table: blocks of the same kernel size and width."""

    kernel_size: int
    repeats: int
    filters: int
    expand_ratio: int
    strides: int


STAGES = (
    Stage(kernel_size=3, repeats=1, filters=16, expand_ratio=1, strides=1),
    Stage(kernel_size=3, repeats=2, filters=24, expand_ratio=6, strides=2),
    Stage(kernel_size=5, repeats=2, filters=40, expand_ratio=6, strides=2),
    Stage(kernel_size=3, repeats=3, filters=80, expand_ratio=6, strides=2),
    Stage(kernel_size=5, repeats=3, filters=112, expand_ratio=6, strides=1),
    Stage(kernel_size=5, repeats=4, filters=192, expand_ratio=6, strides=2),
    Stage(kernel_size=3, repeats=1, filters=320, expand_ratio=6, strides=1),
)


@dataclass(frozen=True, kw_only=True)
class EfficientNet(Spec):
    """EfficientNet (Tan and Le, 2019).

    Attributes:
        width: factor on all filters, which are rounded to multiples of 8.
        depth: factor on the repeats of each stage, rounded up.
        once: whether each stage has a single block.
        skip_stride_cnt: for small images: from 0 on the stem has stride 1, and so have
            that many stages after it.
        dropout: rate before the classifier.
        drop_connect: rate at which residual branches are dropped, growing from 0 over the depth.
        activation: of all convolutions but the last of a block.
    """

    prefix: ClassVar[str] = ""
    stages: ClassVar[tuple[Stage, ...]] = STAGES
    divisor: ClassVar[int] = 8

    width: Factor = 1.0
    depth: Factor = 1.0
    once: bool = False
    skip_stride_cnt: Integer = -1
    dropout: Rate = 0.2
    drop_connect: Rate = 0.2
    activation: Elementwise = "swish"

    def graph(self) -> Graph:
        """The network's layers."""
        g = GraphBuilder(self.name, self.input_shape)
        x = g.zero_pad(f"{self.prefix}stem_conv_pad", g.input, 3)
        x = conv_unit(
            g,
            f"{self.prefix}stem_",
            x,
            self._filters(32),
            kernel_size=3,
            strides=1 if self.skip_stride_cnt >= 0 else 2,
            activation=self.activation,
            padding="valid",
            initializer="conv_normal",
        )
        x = self._body(g, x)
        if self.pooling:
            x = g.global_pool(f"{self.prefix}{self.pooling}_pool", x, self.pooling)
        if self.include_top:
            if self.dropout:
                x = g.dropout(f"{self.prefix}top_dropout", x, self.dropout)
            x = g.dense(f"{self.prefix}probs", x, self.classes, initializer="dense_uniform")
        return g.build(x)

    def _body(self, g: GraphBuilder, x: str) -> str:
        """All between the stem and the pooling."""
        pointwise = partial(plain, g, self.activation)
        x = self._stages(g, x, "", pointwise)
        return pointwise("", "top", x, self._filters(1280))

    def _stages(self, g: GraphBuilder, x: str, path: str, pointwise: Pointwise) -> str:
        """All blocks; drop-connect grows with their number, measured by the unscaled network's."""
        unscaled = sum(1 if self.once else stage.repeats for stage in self.stages)
        number = 0
        for index, stage in enumerate(self.stages):
            strides = 1 if index < self.skip_stride_cnt else stage.strides
            for repeat in range(1 if self.once else ceil(self.depth * stage.repeats)):
                prefix = f"{self.prefix}block{index + 1}{chr(ord('a') + repeat)}_{path}"
                drop_rate = self.drop_connect * number / unscaled
                x = self._block(g, x, prefix, stage, strides, drop_rate, pointwise)
                strides = 1
                number += 1
        return x

    def _block(
        self,
        g: GraphBuilder,
        x: str,
        prefix: str,
        stage: Stage,
        strides: int,
        drop_rate: float,
        pointwise: Pointwise,
    ) -> str:
        """One block of a stage."""
        return mbconv(
            g,
            prefix,
            x,
            self._filters(stage.filters),
            pointwise,
            kernel_size=stage.kernel_size,
            strides=strides,
            expand_ratio=stage.expand_ratio,
            activation=self.activation,
            drop_connect=drop_rate,
            explicit_padding=True,
        )

    def _filters(self, filters: int) -> int:
        return round_filters(filters * self.width, self.divisor)


@dataclass(frozen=True, kw_only=True)
class KEffNet(EfficientNet):
    """kEffNet: EfficientNet with grouped pointwise convolutions (MENDEL 28(1), 2022).

    Attributes:
        ktype: the kType of all pointwise convolutions. Several make parallel paths after the
            stem, joined before the last convolution, which follows the first kType.
        concat_paths: whether parallel paths are concatenated, or else added.
    """

    prefix: ClassVar[str] = "k_"

    ktype: KTypePaths = "D6_16ch"
    concat_paths: bool = True

    def _body(self, g: GraphBuilder, x: str) -> str:
        ktypes = (self.ktype,) if isinstance(self.ktype, str | int) else self.ktype
        pointwise = [partial(grouped, g, ktype, self.activation) for ktype in ktypes]
        paths = [self._stages(g, x, f"_{i}", path) for i, path in enumerate(pointwise)]
        if len(paths) > 1:
            join = g.concat if self.concat_paths else g.add
            paths = [join(None, paths)]
        return pointwise[0](self.prefix, "top", paths[0], self._filters(1280))


register("efficientnet_b0", EfficientNet, width=1.0, depth=1.0, dropout=0.2)
register("efficientnet_b1", EfficientNet, width=1.0, depth=1.1, dropout=0.2)
register("efficientnet_b2", EfficientNet, width=1.1, depth=1.2, dropout=0.3)
register("efficientnet_b3", EfficientNet, width=1.2, depth=1.4, dropout=0.3)
register("efficientnet_b4", EfficientNet, width=1.4, depth=1.8, dropout=0.4)
register("efficientnet_b5", EfficientNet, width=1.6, depth=2.2, dropout=0.4)
register("efficientnet_b6", EfficientNet, width=1.8, depth=2.6, dropout=0.5)
register("efficientnet_b7", EfficientNet, width=2.0, depth=3.1, dropout=0.5)

register("keffnet_s", KEffNet, width=1.0, depth=1.0, dropout=0.2, once=True)
register("keffnet_b0", KEffNet, width=1.0, depth=1.0, dropout=0.2)
register("keffnet_b1", KEffNet, width=1.0, depth=1.1, dropout=0.2)
register("keffnet_b2", KEffNet, width=1.1, depth=1.2, dropout=0.3)
register("keffnet_b3", KEffNet, width=1.2, depth=1.4, dropout=0.3)
register("keffnet_b4", KEffNet, width=1.4, depth=1.8, dropout=0.4)
register("keffnet_b5", KEffNet, width=1.6, depth=2.2, dropout=0.4)
register("keffnet_b6", KEffNet, width=1.8, depth=2.6, dropout=0.5)
register("keffnet_b7", KEffNet, width=2.0, depth=3.1, dropout=0.5)
