"""The papers' demonstration, ported from the original package: only the imports have changed."""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import kconv.cai as cai  # was: import cai.layers, cai.datasets, cai.efficientnet, cai.util
from kconv import datasets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="kEfficientNetS", help="the paper's is kEfficientNetB0")
parser.add_argument("--train-images", type=int, default=2000)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=3, help="50 in the papers")
options = parser.parse_args()
data = datasets.load(
    "fashion_mnist_mini", train_images=options.train_images, image_size=options.image_size
)


class FashionMnist:
    """What the original calls a data set: as Keras has them."""

    @staticmethod
    def load_data():
        """Training images and labels, and those for testing."""
        order = np.random.default_rng(0).permutation(len(data.x_train))
        return (data.x_train[order], data.y_train[order]), (data.x_test, data.y_test)


x_train, y_train, x_val, y_val, x_test, y_test = cai.datasets.load_dataset_with_validation(
    FashionMnist, lab=False, bipolar=True, validation_size=0.1
)
model = getattr(cai.efficientnet, options.model)(
    input_shape=x_train.shape[1:],
    classes=len(data.class_names),
    kType=cai.layers.D6_16ch(),
    skip_stride_cnt=1,
)
model.compile(keras.optimizers.RMSprop(), loss="categorical_crossentropy", metrics=["accuracy"])
print(cai.util.get_model_parameter_counts(model)[0], "parameters")
generator = cai.util.create_image_generator()
model.fit(
    generator.flow(x_train, y_train, batch_size=32),
    validation_data=(x_val, y_val),
    epochs=options.epochs,
    verbose=2,
)
print("test loss and accuracy:", model.evaluate(x_test, y_test, verbose=0))
