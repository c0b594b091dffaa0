"""Files of pictures as people have them: deep ones keep their range, broken ones cost themselves."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sess_lightning.evaluation.datasets import BrokenSampleError, PictureFolder, read_picture, read_pixels
from sess_lightning.evaluation.datasets.pictures import size_on_disk

EIGHT = (np.arange(80 * 100).reshape(80, 100) * 7 % 256).astype(np.uint8)
EIGHT[0, :2] = 0, 255

DEEP = {
    "16-bit.png": EIGHT.astype(np.uint16) * 257,
    "16-bit.tiff": EIGHT.astype(np.uint16) * 257,
    "16-bit values in 32 bits.tiff": EIGHT.astype(np.int32) * 257,
    "8-bit values in 32 bits.tiff": EIGHT.astype(np.int32),
    "floats in 0..1.tiff": EIGHT.astype(np.float32) / 255,
    "floats in 0..255.tiff": EIGHT.astype(np.float32),
    "floats in 0..65535.tiff": EIGHT.astype(np.float32) * 257,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_keep_their_range(name, tmp_path):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    pixels = read_pixels(tmp_path / name)
    assert pixels.shape == (3, 80, 100)
    # A float32 division and a multiplication round: a few units in the last place of 255, 1.5e-5 each.
    assert torch.allclose(pixels, torch.from_numpy(EIGHT).float().expand(3, -1, -1), rtol=0, atol=1e-4)


def test_values_between_those_of_eight_bits_are_kept(tmp_path):
    Image.fromarray(np.array([[0, 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png")[0, 0, 1].item() == pytest.approx(100 / 257)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_eight_bits_stay_bytes(mode, tmp_path):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.fromarray(EIGHT).convert(mode).save(tmp_path / f"a.{suffix}")
    pixels = read_pixels(tmp_path / f"a.{suffix}")
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 80, 100))


def test_floats_of_an_unknown_range_are_refused_and_the_remedy_works(tmp_path):
    path = tmp_path / "a.tiff"
    for values in (EIGHT.astype(np.float32) - 5, EIGHT.astype(np.float32) * 1000):
        Image.fromarray(values).save(path)
        with pytest.raises(
            BrokenSampleError, match=r"outside the known ranges, 0\.\.1 or .*; save it as an 8-bit"
        ):
            read_pixels(path)
    Image.fromarray(EIGHT).save(tmp_path / "a.png")
    assert torch.equal(read_pixels(tmp_path / "a.png")[0], torch.from_numpy(EIGHT))


def test_a_picture_with_a_nan_pixel_is_a_broken_one(tmp_path):
    values = EIGHT.astype(np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(BrokenSampleError, match=r"a\.tiff: cannot be read as an image \(its values nan"):
        read_pixels(tmp_path / "a.tiff")


def bomb(path):
    """A PNG that says it is 60,000 px square."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in chunks)  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


BROKEN = {
    "bomb.png": bomb,
    "empty.png": lambda path: path.touch(),
    "text.jpg": lambda path: path.write_text("404"),
    "cut.png": lambda path: (Image.fromarray(EIGHT).save(path), path.write_bytes(path.read_bytes()[:200])),
    "missing.png": lambda path: None,
    "folder.png": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_a_broken_sample(name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(BrokenSampleError, match=rf"{name}: cannot be read as an image"):
        read_pixels(tmp_path / name)


def test_a_picture_that_would_fill_the_memory_has_no_size_either(tmp_path):
    bomb(tmp_path / "bomb.png")
    with pytest.raises(BrokenSampleError, match=r"bomb\.png: cannot be read as an image \(Image size"):
        size_on_disk(tmp_path / "bomb.png")


def folder(root, box, **image):
    Image.fromarray(EIGHT).save(root / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "class_index": 0, **image}],
        "annotations": [{"image_id": 1, "category_id": 0, "bbox": box}],
        "categories": [{"id": 0, "name": "cat"}],
    }
    (root / "annotations.json").write_text(json.dumps(coco))
    return root


def test_a_jsons_boxes_as_shares_are_refused_and_the_remedy_works(tmp_path):
    box = [0.1, 0.25, 0.5, 0.5]
    with pytest.raises(
        ValueError, match=r"in 0\.\.1, as shares .* multiply by \(width, height, width, height\)"
    ):
        PictureFolder(folder(tmp_path, box))
    pixels = [share * side for share, side in zip(box, (100, 80, 100, 80), strict=True)]
    sample = PictureFolder(folder(tmp_path, pixels))[0]
    assert sample.trials[0].region.tolist() == [[10, 20, 60, 60]]


@pytest.mark.parametrize("box", [[50, 40, 90, 70], [50, 40, -5, 3], [-3, 0, 5, 5], [1, 2, 3]])
def test_a_jsons_box_that_does_not_lie_in_its_picture_costs_that_sample(box, tmp_path):
    with pytest.raises(BrokenSampleError, match=r"a\.png: "):
        PictureFolder(folder(tmp_path, box))[0]


def test_a_json_that_does_not_say_how_large_its_pictures_are_is_read(tmp_path):
    sample = PictureFolder(folder(tmp_path, [1, 2, 3, 4]))[0]
    assert sample.size == (80, 100)
    assert read_picture(sample).shape == (3, 80, 100)
