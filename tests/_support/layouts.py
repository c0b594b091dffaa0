"""Tiny data sets in the true layouts of VOC, COCO and ImageNet, of photographs from scikit-image."""

import json

from PIL import Image
from skimage import data

PHOTOGRAPHS = ("chelsea", "coffee", "rocket")


def photograph(name, width=96):
    picture = Image.fromarray(getattr(data, name)())
    return picture.resize((width, picture.height * width // picture.width))


def _xml(width, height, objects):
    def tag(name, *inner):
        return f"<{name}>{''.join(map(str, inner))}</{name}>"

    def box(corners):
        return tag(
            "bndbox", *(tag(n, c) for n, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        )

    size = tag("size", tag("width", width), tag("height", height), tag("depth", 3))
    return tag(
        "annotation",
        size,
        *(tag("object", tag("name", n), tag("difficult", d), box(b)) for n, d, b in objects),
    )


VOC_OBJECTS = {
    # A large cat; a small, a difficult and a hidden bottle.
    "000001": [("cat", 0, (1, 1, 96, 60)), ("bottle", 0, (11, 21, 20, 40)), ("bottle", 1, (51, 1, 60, 10)),
               ("person", 1, (1, 1, 5, 5))],
    "000002": [("diningtable", 0, (3, 5, 90, 60))],
    "000003": [("person", 0, (41, 11, 50, 20)), ("boat", 0, (1, 31, 96, 64))],
}  # fmt: skip


def write_voc(root):
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for name, (number, objects) in zip(PHOTOGRAPHS, VOC_OBJECTS.items(), strict=True):
        picture = photograph(name)
        picture.save(base / "JPEGImages" / f"{number}.jpg")
        (base / "Annotations" / f"{number}.xml").write_text(_xml(picture.width, picture.height, objects))
    (base / "ImageSets" / "Main" / "test.txt").write_text("\n".join(VOC_OBJECTS) + "\n")
    return root


def write_coco(root):
    """A crowd in run lengths, polygons and a category without a picture; ids with gaps, as the real ones."""
    (root / "val2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = []
    for number, name in enumerate(PHOTOGRAPHS, 1):
        picture, file = photograph(name), f"COCO_val2014_{number:012d}.jpg"
        picture.save(root / "val2014" / file)
        images.append({"id": number, "file_name": file, "width": picture.width, "height": picture.height})
    width, height = images[0]["width"], images[0]["height"]
    # Run lengths go down the columns: the last two columns are crowd.
    crowd = {"size": [height, width], "counts": [(width - 2) * height, 2 * height]}
    annotations = [
        {"image_id": 1, "category_id": 17, "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
         "bbox": [10, 10, 20, 10], "iscrowd": 0},
        {"image_id": 1, "category_id": 17, "segmentation": crowd,
         "bbox": [width - 2, 0, 2, height], "iscrowd": 1},
        {"image_id": 1, "category_id": 47, "segmentation": [[40, 0, 90, 0, 90, 60, 40, 60]],
         "bbox": [40, 0, 50, 60], "iscrowd": 0},
        {"image_id": 2, "category_id": 47, "segmentation": [[5, 5, 15, 5, 15, 15]],
         "bbox": [5, 5, 10, 10], "iscrowd": 0},
    ]  # fmt: skip
    categories = [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 47, "name": "cup"}]
    for number, annotation in enumerate(annotations, 1):
        annotation |= {"id": number, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(coco))
    return root


SYNSETS = {"chelsea": "n02123045", "coffee": "n07930864", "rocket": "n04266014"}


def write_imagenet(root, folders=True):
    for number, (name, synset) in enumerate(SYNSETS.items(), 1):
        picture, stem = photograph(name), f"ILSVRC2012_val_{number:08d}"
        path = root / "val" / (synset if folders else "") / f"{stem}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        (root / "bbox").mkdir(exist_ok=True)
        text = _xml(picture.width, picture.height, [(synset, 0, (4, 8, 50, 40))])
        (root / "bbox" / f"{stem}.xml").write_text(text)
    (root / "synsets.txt").write_text("".join(f"{synset} {name}\n" for name, synset in SYNSETS.items()))
    return root


def write_own(root):
    """Class folders, and boxes (x, y, w, h) for one of the two classes."""
    images, annotations = [], []
    for number, (name, folder) in enumerate(zip(PHOTOGRAPHS, ("animal", "thing", "thing"), strict=True), 1):
        picture = photograph(name)
        (root / folder).mkdir(parents=True, exist_ok=True)
        picture.save(root / folder / f"{name}.png")
        file = f"{folder}/{name}.png"
        images.append({"id": number, "file_name": file, "width": picture.width, "height": picture.height})
        if folder == "thing":
            annotations.append({"id": number, "image_id": number, "category_id": 7, "bbox": [10, 20, 30, 25]})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]}
    (root / "annotations.json").write_text(json.dumps(coco))
    return root
