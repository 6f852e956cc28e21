"""The original package's modules and functions, on Keras 3.

A script written for the original replaces its imports of ``cai.layers`` and the like by
``import kconv.cai as cai``; the modules are attributes of it. Of the original's functions those
that scripts call are here, with the same names, arguments and defaults: the models, the layers, the
data sets, and the tools to train, test and look into a model.

Example:
    >>> import kconv.cai as cai
    >>> model = cai.efficientnet.kEfficientNetB0(
    ...     input_shape=(32, 32, 3), classes=10, kType=cai.layers.D6_16ch(), skip_stride_cnt=3)
    >>> model.output_shape, cai.util.get_model_parameter_counts(model)
    ((None, 10), (639702, 685334))
"""

from kconv.cai import (
    datasets,
    densenet,
    efficientnet,
    gradientascent,
    inception_v3,
    layers,
    mobilenet,
    mobilenet_v3,
    models,
    util,
)

__all__ = [
    "datasets",
    "densenet",
    "efficientnet",
    "gradientascent",
    "inception_v3",
    "layers",
    "mobilenet",
    "mobilenet_v3",
    "models",
    "util",
]
