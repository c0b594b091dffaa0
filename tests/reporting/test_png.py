import io

import numpy as np
import pytest
from PIL import Image

from sess_lightning.reporting.png import png


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (33, 20), (400, 300)])
def test_a_png_holds_every_pixel(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png(picture))) as image:
        image.verify()  # The checksums, too.
    with Image.open(io.BytesIO(png(picture))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), picture)


def test_parts_of_other_pictures_are_encoded_like_copies_of_them():
    picture = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    for part in (picture[2:9, 3:20], picture[::-1], picture.transpose(1, 0, 2), picture[..., ::-1]):
        assert png(part) == png(part.copy())


def test_what_is_even_takes_little_room():
    assert len(png(np.full((500, 500, 3), 90, np.uint8))) < 500 * 500 * 3 / 100
