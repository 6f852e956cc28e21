"""The papers' networks as data: specs, their layer graphs, and their counts; no framework needed.

Example:
    >>> spec = create("keffnet_b0", ktype="D6_16ch", classes=10, input_shape=(32, 32, 3),
    ...               skip_stride_cnt=3)
    >>> count(spec)
    Counts(trainable=639702, total=685334, macs=81153588)
"""

from __future__ import annotations

from kconv.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS
from kconv.models.builder import GraphBuilder
from kconv.models.counting import Counts, count
from kconv.models.densenet import DenseNet, KDenseNet
from kconv.models.efficientnet import EfficientNet, KEffNet
from kconv.models.graph import Graph, Layer
from kconv.models.inception_v3 import InceptionV3, KInceptionV3
from kconv.models.mobilenet import KMobileNet, MobileNet
from kconv.models.mobilenet_v3 import KMobileNetV3, MobileNetV3
from kconv.models.spec import Spec, create, list_models
from kconv.models.tables import ModelRow, PaperRow, paper_table, table

__all__ = [
    "ACTIVATIONS",
    "FUSED_ACTIVATIONS",
    "Counts",
    "DenseNet",
    "EfficientNet",
    "Graph",
    "GraphBuilder",
    "InceptionV3",
    "KDenseNet",
    "KEffNet",
    "KInceptionV3",
    "KMobileNet",
    "KMobileNetV3",
    "Layer",
    "MobileNet",
    "MobileNetV3",
    "ModelRow",
    "PaperRow",
    "Spec",
    "count",
    "create",
    "list_models",
    "paper_table",
    "table",
]
