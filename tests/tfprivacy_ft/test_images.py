"""Folders of images as pixels."""

import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.images import class_folders, fitted, read_images

RNG = np.random.default_rng(0)


def write_image(path, height=4, width=6, channels=3):
    pixels = RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(pixels).numpy())
    return pixels


def test_pixels_are_those_of_the_files_in_order(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    pixels = [write_image(path) for path in paths]
    seen = []
    np.testing.assert_array_equal(read_images(paths, progress=lambda *done: seen.append(done)), pixels)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with_transparency = write_image(tmp_path / "a.png", channels=4)
    np.testing.assert_array_equal(read_images([tmp_path / "a.png"])[0], with_transparency[..., :3])


def test_images_of_several_sizes_are_refused_unless_a_size_is_given(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    pixels = write_image(paths[0], 8, 8)
    write_image(paths[1], 4, 6)
    with pytest.raises(
        DatasetError, match="images have several sizes, such as 8x8 and 4x6: give image_size=HEIGHTxWIDTH"
    ):
        read_images(paths)
    images = read_images(paths, size=(8, 8))
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(images[0], pixels)  # which needed no scaling


def test_grey_and_coloured_images_together_are_refused_unless_channels_are_given(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    write_image(paths[0], channels=3)
    grey = write_image(paths[1], channels=1)
    with pytest.raises(DatasetError, match="images have 3 and 1 channels: give channels=1"):
        read_images(paths)
    np.testing.assert_array_equal(read_images(paths, channels=3)[1], np.repeat(grey, 3, axis=2))
    assert read_images(paths, channels=1).shape == (2, 4, 6, 1)
    with pytest.raises(InvalidArgumentError, match="channels=2 is not allowed"):
        read_images(paths, channels=2)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"a.png' is damaged"):
        read_images([tmp_path / "a.png"])
    with pytest.raises(DatasetError, match=r"a.txt' does not end in .bmp"):
        read_images([tmp_path / "a.txt"])
    with pytest.raises(DatasetError, match=r"b.png' cannot be read \(No such file"):
        read_images([tmp_path / "b.png"])
    with pytest.raises(DatasetError, match="there are no images"):
        read_images([])


def test_sub_folders_are_classes_in_the_order_given(tmp_path):
    for name in ("cat/1.png", "cat/more/2.png", "dog/1.png", "cat/.hidden", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, y, names = class_folders(tmp_path, ["dog", "cat"])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["dog/1.png", "cat/1.png", "cat/more/2.png"]
    assert y.tolist() == [0, 1, 1] and names == ("dog", "cat")
    with pytest.raises(DatasetError, match="has the sub-folders cat, dog: give it one for each class, cat, cow, or"):
        class_folders(tmp_path, ["cat", "cow"])
    with pytest.raises(DatasetError, match="has the sub-folders more: "):
        class_folders(tmp_path / "cat")
    (tmp_path / "dog" / "1.png").unlink()
    with pytest.raises(DatasetError, match="holds images of 1 classes"):
        class_folders(tmp_path)
    with pytest.raises(DatasetError, match="cannot be read"):
        class_folders(tmp_path / "none")


def test_arrays_are_scaled_as_files_are(tmp_path):
    pixels = np.stack([write_image(tmp_path / f"{number}.png", 8, 6) for number in range(2)])
    from_files = read_images([tmp_path / "0.png", tmp_path / "1.png"], size=(5, 7))
    np.testing.assert_array_equal(fitted(pixels, size=(5, 7)), from_files)
    assert fitted(pixels[..., :1], channels=3).tolist() == np.repeat(pixels[..., :1], 3, axis=3).tolist()
    grey = read_images([tmp_path / "0.png"], channels=1)
    assert np.abs(fitted(pixels[:1], channels=1).astype(int) - grey).max() <= 1  # to rounding
