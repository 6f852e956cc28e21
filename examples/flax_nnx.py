"""Train a network with Flax and Optax: a plain nnx training loop."""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kconv import augment, datasets
from kconv.jax.nnx import create_model


@nnx.jit
def step(network, optimizer, images, labels):
    """One step of training; the network ends in a softmax."""

    def loss_of(network):
        likelihoods = jnp.take_along_axis(network(images), labels[:, None], 1)
        return -jnp.log(jnp.maximum(likelihoods, 1e-7)).mean()

    loss, grads = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, grads)
    return loss


@nnx.jit
def classify(network, images):
    """The likeliest class of each image."""
    return network(images).argmax(1)


def main() -> None:
    """Train, then print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    data = datasets.load(
        "fashion_mnist_mini", image_size=options.image_size, train_images=options.train_images
    )
    network = create_model(
        options.model, num_classes=10, in_chans=1, image_size=options.image_size, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(network, optax.adam(2e-3), wrt=nnx.Param)
    rng, size = np.random.default_rng(0), 20
    for epoch in range(options.epochs):
        for part in np.split(rng.permutation(len(data.x_train)), len(data.x_train) // size):
            loss = step(network, optimizer, augment.scale(data.x_train[part]), data.y_train[part])
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    network.eval()
    found = [classify(network, augment.scale(x)) for x in np.split(data.x_test, 10)]
    print(f"test accuracy {(np.concatenate(found) == data.y_test).mean():.3f}")


if __name__ == "__main__":
    main()
