"""MobileNet, and kMobileNet: the same network with grouped pointwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from kconv.models.activations import ActivationName
from kconv.models.builder import GraphBuilder
from kconv.models.graph import Graph
from kconv.models.options import Elementwise, Factor, Integer, KTypeOption, Rate, Whole
from kconv.models.spec import Spec, register

__all__ = ["KMobileNet", "MobileNet"]

FILTERS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDED = (2, 4, 6, 12)
"""The blocks, counted from 1, that halve the image."""


@dataclass(frozen=True, kw_only=True)
class MobileNet(Spec):
    """MobileNet (Howard et al., 2017).

    Attributes:
        alpha: factor on all filters.
        depth_multiplier: outputs of a depthwise convolution per channel.
        skip_stride_cnt: for small images: from 0 on the stem has stride 1, and so have
            that many of the blocks that halve the image, the first ones.
        dropout: rate before the classifier.
        conv1_activation: after the stem.
        d_separable_activation: after the depthwise convolutions.
        activation: after the pointwise convolutions.
    """

    alpha: Factor = 1.0
    depth_multiplier: Whole = 1
    skip_stride_cnt: Integer = -1
    dropout: Rate = 0.001
    conv1_activation: Elementwise = "relu6"
    d_separable_activation: Elementwise = "relu6"
    activation: Elementwise = "relu6"

    def graph(self) -> Graph:
        """The network's layers."""
        g = GraphBuilder(self.name, self.input_shape)
        x = g.zero_pad("conv1_pad", g.input, 3)
        strides = 1 if self.skip_stride_cnt >= 0 else 2
        x = g.conv("conv1", x, int(32 * self.alpha), 3, strides, padding="valid")
        x = _normalized(g, "conv1", x, self.conv1_activation)
        strided = STRIDED[max(0, self.skip_stride_cnt) :]
        for number, filters in enumerate(FILTERS, start=1):
            if number in strided:
                x = g.zero_pad(f"conv_pad_{number}", x, 3)
            x = g.depthwise_conv(
                f"conv_dw_{number}",
                x,
                3,
                2 if number in strided else 1,
                padding="valid" if number in strided else "same",
                depth_multiplier=self.depth_multiplier,
            )
            x = _normalized(g, f"conv_dw_{number}", x, self.d_separable_activation)
            x = self._pointwise(g, f"conv_pw_{number}", x, int(filters * self.alpha))
        if self.pooling:
            x = g.global_pool(None, x, self.pooling)
        if self.include_top:
            x = g.reshape("reshape_1", x)
            if self.dropout:
                x = g.dropout("dropout", x, self.dropout)
            x = g.conv("conv_preds", x, self.classes, use_bias=True)
            x = g.flatten("reshape_2", x)
            x = g.activation("act_softmax", x, "softmax")
        return g.build(x)

    def _pointwise(self, g: GraphBuilder, name: str, x: str, filters: int) -> str:
        return _normalized(g, name, g.conv(name, x, filters), self.activation)


@dataclass(frozen=True, kw_only=True)
class KMobileNet(MobileNet):
    """kMobileNet: MobileNet with grouped pointwise convolutions (MENDEL 28(1), 2022).

    Attributes:
        ktype: the kType of all pointwise convolutions.
    """

    ktype: KTypeOption = "D6_16ch"
    conv1_activation: Elementwise = "swish"
    d_separable_activation: Elementwise = "swish"
    activation: Elementwise = "swish"

    def _pointwise(self, g: GraphBuilder, name: str, x: str, filters: int) -> str:
        return g.pointwise(f"{name}_bn", x, filters, self.ktype, activation=self.activation)


def _normalized(g: GraphBuilder, name: str, x: str, activation: ActivationName) -> str:
    """Batch norm and activation, which is called after the original's type of layer."""
    x = g.batch_norm(f"{name}_bn", x)
    return g.activation(f"{name}_{'relu' if activation == 'relu6' else 'act'}", x, activation)


register("mobilenet", MobileNet)
register("kmobilenet", KMobileNet)
