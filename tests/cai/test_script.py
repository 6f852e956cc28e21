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
