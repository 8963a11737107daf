"""Drawn changes of images: none, whole pixels, and the bounds of the rest."""

import numpy as np

from pikv_core.data.warp import _read, warp

RNG = np.random.default_rng(0)
IMAGES = RNG.random((50, 8, 6), dtype=np.float32)


def test_without_change_images_stay():
    np.testing.assert_allclose(warp(RNG, IMAGES, 0, 0, 0), IMAGES, atol=1e-6)


def test_between_pixels_the_values_are_bilinear_and_zero_comes_from_outside():
    places = np.stack(np.meshgrid(np.arange(8.0), np.arange(6.0), indexing="ij"), -1).reshape(1, -1, 2)
    places = np.repeat(places, 50, 0)
    down = np.zeros_like(IMAGES)
    down[:, :-1] = IMAGES[:, 1:]
    np.testing.assert_allclose(_read(IMAGES, places + np.array([1, 0])).reshape(IMAGES.shape), down, atol=1e-6)
    np.testing.assert_allclose(
        _read(IMAGES, places + np.array([0.25, 0])).reshape(IMAGES.shape), 0.75 * IMAGES + 0.25 * down, atol=1e-6
    )
    assert not _read(IMAGES, places + 20).any() and not _read(IMAGES, places - 20).any()


def test_a_quarter_turn_is_one():
    class Quarter:
        def uniform(self, low, high, size):
            return np.full(size, high)

    square = IMAGES[:, :6]
    turned = warp(Quarter(), square, 90, 0, 0)
    np.testing.assert_allclose(turned, np.rot90(square, -1, axes=(1, 2)), atol=1e-6)


def test_changes_are_small_and_drawn_for_each_image():
    one = np.repeat(IMAGES[:1], 30, 0)
    changed = warp(np.random.default_rng(1), one, 10, 0.1, 0.5)
    assert changed.dtype == np.float32 and changed.min() >= 0 and changed.max() <= IMAGES[0].max() + 1e-6
    assert len({image.tobytes() for image in changed}) == 30
    again = warp(np.random.default_rng(1), one, 10, 0.1, 0.5)
    assert np.array_equal(changed, again)
