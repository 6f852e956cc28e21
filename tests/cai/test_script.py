"""A script with the shape of the original's Colab demos, in miniature."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kconv.cai as cai


class Blobs:
    """Three classes of images that are bright at different places."""

    @staticmethod
    def load_data():
        rng = np.random.default_rng(0)
        labels = np.arange(60) % 3
        images = rng.integers(0, 60, (60, 8, 8, 1))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] += 150
        images = images.astype(np.uint8)
        return (images[:40], labels[:40]), (images[40:], labels[40:])


@pytest.mark.slow
def test_colab_demo(tmp_path, capsys) -> None:
    keras.utils.set_random_seed(0)
    k_type = cai.layers.D6_16ch()
    batch_size, epochs, num_classes = 6, 2, 3
    best_model = str(tmp_path / "best.keras")

    x_train, y_train, x_val, y_val, x_test, y_test = cai.datasets.load_dataset_with_validation(
        Blobs,
        lab=False,
        verbose=True,
        bipolar=True,
        validation_size=0.1,
        validation_flip_horizontal=True,
    )
    generators = {
        "rotation_range": 20,
        "width_shift_range": 0.3,
        "height_shift_range": 0.3,
        "channel_shift_range": 0.0,
    }
    train_datagen = cai.util.create_image_generator(**generators)
    validation_datagen = cai.util.create_image_generator_no_augmentation()

    def cyclic(epoch: int) -> float:
        epoch = epoch % 25
        if epoch < 7:
            return 0.001 * (1 + 0.5 * epoch)
        return 0.004 * 0.85 ** (epoch - 7)

    model = cai.efficientnet.kEfficientNetS(
        include_top=True,
        skip_stride_cnt=3,
        input_shape=(None, None, 1),
        classes=num_classes,
        kType=k_type,
    )
    model.compile(
        loss="categorical_crossentropy",
        optimizer=keras.optimizers.RMSprop(),
        metrics=["accuracy"],
    )
    fit_result = model.fit(
        x=train_datagen.flow(x_train, y_train, batch_size=batch_size, shuffle=True),
        epochs=epochs,
        batch_size=batch_size,
        validation_data=validation_datagen.flow(x_val, y_val, batch_size=8, shuffle=False),
        callbacks=[
            keras.callbacks.LearningRateScheduler(cyclic),
            keras.callbacks.ModelCheckpoint(best_model, monitor="val_loss", save_best_only=True),
        ],
        verbose=0,
    )
    assert set(fit_result.history) >= {"accuracy", "val_accuracy", "loss", "val_loss"}

    best = cai.models.load_kereas_model(best_model)
    loss, accuracy = best.evaluate(x_test, y_test, batch_size=20, verbose=0)
    assert np.isfinite(loss)
    capsys.readouterr()
    cai.datasets.test_flips_on_saved_model(
        x_test,
        y_test,
        best_model,
        has_flip_x=True,
        has_flip_y=False,
        has_bw=False,
        center_crop=0.15,
    )
    report = capsys.readouterr().out
    assert f"accuracy {accuracy:.4f}" in report.partition("Test Flipped X")[0]
    assert "Original + Flipped X + Center Crop" in report


def linear() -> keras.Model:
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
    return keras.Sequential(layers)


def test_training_helper(tmp_path, capsys) -> None:
    model, rates = linear(), []

    def scheduler(epoch: int) -> float:
        rates.append(epoch)
        return 0.01

    result, file, csv = cai.datasets.train_model_on_dataset(
        model, Blobs, str(tmp_path / "b"), scheduler, batch_size=8, epochs=2, momentum=0.5
    )
    assert rates == [0, 1]
    assert capsys.readouterr().out == ""
    assert (file, csv) == (str(tmp_path / "b.keras"), str(tmp_path / "b.csv"))
    assert not (tmp_path / "b.csv").exists()
    assert set(result.history) >= {"accuracy", "val_accuracy", "loss", "val_loss"}
    optimizer = model.optimizer
    assert (optimizer.momentum, optimizer.nesterov) == (0.5, True)
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    x_test, y_test = cai.datasets.load_dataset(Blobs)[2:]
    _, accuracy = cai.models.load_kereas_model(file).evaluate(x_test, y_test, verbose=0)
    assert accuracy == pytest.approx(max(result.history["val_accuracy"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_multiprocessing": True}, NotImplementedError, "use_multiprocessing=True"),
        ({"monitor": "val_acc"}, ValueError, "monitor='val_acc' is not one of accuracy, loss"),
        (
            {"model": keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])},
            ValueError,
            r"\(None, 2\).* 3 classes",
        ),
    ],
)
def test_training_that_is_refused(options, error, message: str, tmp_path) -> None:
    arguments = {"model": linear(), "dataset": Blobs, "base_model_name": str(tmp_path / "b")}
    arguments |= {"plrscheduler": cai.densenet.lrscheduler, "epochs": 1, **options}
    with pytest.raises(error, match=message):
        cai.datasets.train_model_on_dataset(**arguments)


@pytest.mark.slow
def test_densenet_helper(tmp_path, monkeypatch) -> None:
    """The network, the epochs and the learning rate reach the training."""

    class TenBlobs:
        @staticmethod
        def load_data():
            (x, _), _ = Blobs.load_data()
            return (x[:20], np.arange(20) % 10), (x[:10], np.arange(10))

    result, file, _ = cai.densenet.train_simple_densenet_on_dataset(
        str(tmp_path / "d"), TenBlobs, (8, 8, 1), 1, batch_size=10, epochs=1
    )
    assert result.history["learning_rate"] == [pytest.approx(0.1)]
    assert cai.models.load_kereas_model(file).output_shape == (None, 10)
    with pytest.raises(ValueError, match="3 classes"):
        cai.densenet.train_simple_densenet_on_dataset(str(tmp_path / "d"), Blobs, (8, 8, 1), 1)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", Blobs.load_data)
    with pytest.raises(ValueError, match="3 classes"):
        cai.densenet.train_simple_densenet_on_cifar10(str(tmp_path / "d"), 1)
    with pytest.raises(ValueError, match="3 classes"):
        cai.datasets.train_model_on_cifar10(
            keras.Sequential([keras.Input((5,)), keras.layers.ReLU()]),
            str(tmp_path / "d"),
            cai.densenet.lrscheduler,
        )


def test_learning_rates() -> None:
    epochs = (0, 49, 50, 74, 75, 99, 100, 149, 150, 224, 225)
    densenet = cai.densenet
    plain = [0.1] * 8 + [0.01] * 2 + [0.001]
    assert [densenet.lrscheduler(epoch) for epoch in epochs] == pytest.approx(plain)
    smooth = [densenet.smooth_lrscheduler(epoch) for epoch in epochs]
    assert smooth == pytest.approx([rate / 10 for rate in plain])
    cycles = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.1, 0.1, 0.01, 0.1, 0.1]
    cyclic = [densenet.cyclical_lrscheduler(epoch) for epoch in epochs]
    assert cyclic == pytest.approx(cycles)
    cyclic = [densenet.cyclical_smooth_lrscheduler(epoch) for epoch in epochs]
    assert cyclic == pytest.approx([rate / 10 for rate in cycles])
