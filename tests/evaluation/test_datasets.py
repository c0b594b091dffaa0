import json
import pickle
import re
import shutil

import pytest
import torch

from layouts import photograph, write_coco, write_imagenet, write_own, write_voc
from sess_lightning.evaluation.datasets import (
    COCO14,
    VOC07,
    VOC_CLASSES,
    BrokenSampleError,
    ImageNet,
    PictureFolder,
    covered,
    read_flags,
    read_picture,
    read_synsets,
)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path)


@pytest.fixture
def coco(tmp_path):
    pytest.importorskip("pycocotools")
    return write_coco(tmp_path)


def by_name(benchmark, sample):
    return {benchmark.class_names[trial.target]: trial for trial in sample.trials}


def test_voc_boxes_counted_from_one_become_half_open_from_zero(voc):
    trials = by_name(VOC07(voc), VOC07(voc)[1])
    assert trials["diningtable"].region.tolist() == [[2, 4, 90, 60]]


def test_voc_difficult_objects_are_in_the_region_and_only_wholly_difficult_classes_are_left_out(voc):
    benchmark = VOC07(voc)
    sample = benchmark[0]
    trials = by_name(benchmark, sample)
    assert set(trials) == {"cat", "bottle"}
    assert sample.skipped == 1
    assert trials["bottle"].region.tolist() == [[10, 20, 20, 40], [50, 0, 60, 10]]


def test_difficult_by_rule_is_small_and_among_other_classes(voc):
    benchmark = VOC07(voc)
    marks = {(sample.id, name): trial.difficult for sample in map(benchmark.__getitem__, range(3))
             for name, trial in by_name(benchmark, sample).items()}  # fmt: skip
    assert marks == {
        ("000001", "cat"): False,
        ("000001", "bottle"): True,
        ("000002", "diningtable"): False,
        ("000003", "person"): True,
        ("000003", "boat"): False,
    }


def test_difficult_by_list_follows_the_list_and_unlisted_pictures_count(voc, tmp_path):
    flags = dict.fromkeys(VOC_CLASSES, "0") | {"cat": "1"}
    path = tmp_path / "difficult.txt"
    path.write_text("\t".join(["000001", *flags.values()]) + "\n")
    benchmark = VOC07(voc, difficult_list=path)
    assert {name: trial.difficult for name, trial in by_name(benchmark, benchmark[0]).items()} == {
        "cat": True,
        "bottle": False,
    }
    assert benchmark[1].trials[0].difficult


def test_a_list_with_another_number_of_flags_is_refused(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("000001\t0\t1\n")
    with pytest.raises(ValueError, match=r"flags.txt, line 1: expected an image id and 20 flags"):
        read_flags(path, 20)


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_root_may_point_anywhere_in_the_layout(voc, inside):
    assert VOC07(voc / inside).ids == ["000001", "000002", "000003"]


def test_missing_voc_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("VOCdevkit/VOC2007")):
        VOC07(tmp_path)


def test_coco_regions_are_unions_of_segmentations_with_crowds(coco):
    benchmark = COCO14(coco)
    trials = by_name(benchmark, benchmark[0])
    mask = trials["cat"].region
    expected = torch.zeros_like(mask)
    expected[10:20, 10:30] = True
    expected[:, -2:] = True
    assert torch.equal(mask, expected)
    assert (trials["cat"].difficult, trials["cup"].difficult) == (True, False)


def test_coco_boxes_are_an_option(coco):
    benchmark = COCO14(coco, region="boxes")
    assert by_name(benchmark, benchmark[0])["cup"].region.tolist() == [[40, 0, 90, 60]]


def test_coco_categories_are_counted_by_rising_id_and_pictures_may_have_none(coco):
    benchmark = COCO14(coco)
    assert list(benchmark.class_names) == ["person", "cat", "cup"]
    assert [trial.target for trial in benchmark[0].trials] == [1, 2]
    assert benchmark[2].trials == ()


def test_coco_without_its_files_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_val2014\.json does not exist"):
        COCO14(tmp_path)


@pytest.mark.parametrize("folders", [True, False])
def test_imagenet_classes_come_from_folders_or_from_the_xml(tmp_path, folders):
    root = write_imagenet(tmp_path, folders)
    benchmark = ImageNet(root / "val", root / "bbox", root / "synsets.txt")
    samples = [benchmark[i] for i in range(3)]
    assert [sample.trials[0].target for sample in samples] == [0, 1, 2]
    assert samples[0].trials[0].region.tolist() == [[4, 8, 51, 41]]


def test_imagenet_without_boxes_still_has_classes(tmp_path):
    root = write_imagenet(tmp_path)
    benchmark = ImageNet(root / "val", synsets=root / "synsets.txt")
    assert benchmark[1].trials[0] == (1, None, None)
    assert benchmark[1].size == tuple(photograph("coffee").size[::-1])


def test_imagenet_with_few_folders_asks_for_the_synsets(tmp_path):
    root = write_imagenet(tmp_path)
    with pytest.raises(ValueError, match=r"3 class folders .* not 1000"):
        ImageNet(root / "val")


def test_synsets_are_read_from_the_class_index_json(tmp_path):
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}))
    assert read_synsets(path) == ["n01440764", "n01443537"]


def test_own_class_folders_with_a_coco_json(tmp_path):
    benchmark = PictureFolder(write_own(tmp_path))
    assert list(benchmark.class_names) == ["animal", "thing"]
    targets = [(trial.target, trial.region is None) for i in range(3) for trial in benchmark[i].trials]
    assert targets == [(0, True), (1, False), (1, False)]
    assert benchmark[1].trials[0].region.tolist() == [[10, 20, 40, 45]]


def test_own_class_folders_alone(tmp_path):
    root = write_own(tmp_path)
    (root / "annotations.json").unlink()
    assert [PictureFolder(root)[i].trials[0].target for i in range(3)] == [0, 1, 1]


def class_folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        photograph("chelsea").save(root / name / "a.png")
    return root


@pytest.mark.parametrize(
    ("folders", "classes", "targets"),
    [
        (["Egyptian_cat", "tench"], ["tench", "tabby", "Egyptian cat"], [2, 0]),  # By name.
        (["10", "2"], [f"class {i}" for i in range(11)], [10, 2]),  # By number.
        (["n01", "n02"], ["cat", "dog"], [0, 1]),  # As many, as torchvision's ImageFolder takes them.
    ],
)
def test_class_folders_are_found_among_the_models_classes(tmp_path, folders, classes, targets):
    benchmark = PictureFolder(class_folders(tmp_path, *folders), classes=classes)
    assert [benchmark[i].trials[0].target for i in range(2)] == targets
    assert list(benchmark.class_names) == classes


def test_numbers_that_sort_otherwise_as_text_are_refused_and_leading_zeros_work(tmp_path):
    classes = [f"class {i}" for i in range(11)]
    root = class_folders(tmp_path / "plain", *map(str, range(11)))
    with pytest.raises(
        ValueError, match=r"'2' is class 2 by its number, but class 3 as .* zeros, such as 02\."
    ):
        PictureFolder(root, classes=classes)
    root = class_folders(tmp_path / "padded", *(f"{i:02d}" for i in range(11)))
    benchmark = PictureFolder(root, classes=classes)
    assert [benchmark[i].trials[0].target for i in range(11)] == [*range(11)]


def test_a_folder_is_read_as_by_image_folder_but_for_what_is_hidden(tmp_path):
    class_folders(tmp_path, "cat", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "elsewhere/dog")
    (tmp_path / "cat" / "._a.png").write_bytes(b"of macOS")
    photograph("coffee").save(tmp_path / "cat" / "b.PPM")
    (tmp_path / "elsewhere").rename(tmp_path.with_name(f"{tmp_path.name} elsewhere"))
    (tmp_path / "dog").symlink_to(tmp_path.with_name(f"{tmp_path.name} elsewhere") / "dog")
    (tmp_path / "dog" / "loop").symlink_to(tmp_path / "dog")
    benchmark = PictureFolder(tmp_path)
    assert benchmark.ids == ["cat/a.png", "cat/b.PPM", "dog/a.png"]
    assert [benchmark[i].trials[0].target for i in range(3)] == [0, 0, 1]


def test_a_class_folder_that_is_no_class_of_the_model_is_refused(tmp_path):
    root = class_folders(tmp_path, "taby", "tench")
    with pytest.raises(
        ValueError, match=r"'taby' is not one of the model's 3 classes \(similar: tabby\); name"
    ):
        PictureFolder(root, classes=["tench", "tabby", "cat"])


def test_images_beside_class_folders_are_refused_and_alone_have_no_label(tmp_path):
    photograph("chelsea").save(tmp_path / "a.png")
    assert PictureFolder(tmp_path)[0].trials == ()
    class_folders(tmp_path / "b")
    with pytest.raises(ValueError, match="in class folders and beside them"):
        PictureFolder(class_folders(tmp_path, "c"))


def test_a_damaged_json_is_named(tmp_path):
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match=r"annotations\.json: is not valid JSON"):
        PictureFolder(tmp_path)


def write_json(root, image, categories, annotations):
    photograph("chelsea").save(root / "a.jpg")
    height = photograph("chelsea").height
    images = [{"id": 1, "file_name": "a.jpg", "width": 96, "height": height, **image}]
    coco = {"images": images, "categories": categories, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(coco))
    return root


BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
CAT = {"id": 3, "name": "cat"}


@pytest.mark.parametrize(
    ("coco", "told"),
    [
        ([], r"annotations\.json: is not in COCO's format, \{\"images\": \["),
        ({"images": [{"id": 1}]}, "one of its images has no 'file_name'"),
        ({"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}, "annotations has no 'category_id'"),
        ({"annotations": [BOX | {"image_id": "1"}]}, "no annotation's image_id, such as '1', is the id"),
        ({"categories": []}, "no annotation's category_id, such as 3, is the id of one of its categories"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "class_index": "cat"}]},
         "class_index of a.jpg must be a whole number, the model's class, got 'cat'"),
    ],
)  # fmt: skip
def test_a_json_whose_parts_do_not_fit_is_refused(tmp_path, coco, told):
    root = write_json(tmp_path, {}, [CAT], [BOX])
    whole = json.loads((root / "annotations.json").read_text())
    assert len(PictureFolder(root)[0].trials) == 1
    (root / "annotations.json").write_text(json.dumps(whole | coco if coco else coco))
    with pytest.raises(ValueError, match=told):
        PictureFolder(root)


@pytest.mark.parametrize(
    ("classes", "target"),
    [(["dog", "big Cat", "cat"], 2), (["dog"], 0), (None, 0)],
    ids=["by name", "by place", "by place, of a model that nothing is known of"],
)
def test_a_category_is_the_class_of_its_name(tmp_path, classes, target):
    benchmark = PictureFolder(write_json(tmp_path, {}, [CAT], [BOX]), classes=classes)
    assert [trial.target for trial in benchmark[0].trials] == [target]


def test_a_category_that_is_no_class_of_the_model_is_refused_and_the_remedy_works(tmp_path):
    classes = ["dog", "Cats", "owl"]
    with pytest.raises(
        ValueError, match=r"'cat' is not one of the model's 3 classes \(similar: Cats\); name cat"
    ):
        PictureFolder(write_json(tmp_path, {}, [CAT], [BOX]), classes=classes)
    root = write_json(tmp_path, {}, [CAT | {"class_index": 1}], [BOX])
    (trial,) = PictureFolder(root, classes=classes)[0].trials
    assert trial.target == 1


@pytest.mark.parametrize("name", ["a.jpg", "{root}/a.jpg", "images/a.jpg", "{root}/images/a.jpg"])
def test_files_of_a_json_may_be_absolute_or_lie_in_a_folder_that_is_no_class(tmp_path, name):
    root = write_json(tmp_path, {"file_name": name.format(root=tmp_path)}, [CAT], [BOX])
    (root / "images").mkdir()
    shutil.copy(root / "a.jpg", root / "images")
    benchmark = PictureFolder(root)
    assert benchmark.ids == [name.removeprefix("{root}/")]
    (trial,) = benchmark[0].trials
    assert (trial.target, trial.region.tolist()) == (0, [[1, 2, 4, 6]])


def test_a_file_of_a_json_that_lies_elsewhere_is_named(tmp_path):
    root = write_json(tmp_path, {"file_name": "/elsewhere/a.jpg"}, [CAT], [BOX])
    with pytest.raises(ValueError, match=r"/elsewhere/a\.jpg does not lie in .*; give the folder"):
        PictureFolder(root)


@pytest.mark.parametrize("box", [None, [], [1, 2, 3]])
def test_an_annotation_without_a_box_is_named(tmp_path, box):
    root = write_json(tmp_path, {}, [CAT], [BOX | {"bbox": box}])
    with pytest.raises(BrokenSampleError, match=r"a\.jpg: an annotation's bbox must be \[x, y, w, h\], px"):
        PictureFolder(root)[0]


def test_an_image_that_carries_its_class_is_explained_for_that_class_alone(tmp_path):
    boxes = [{"image_id": 1, "category_id": 281, "bbox": [1, 2, 3, 4]},
             {"image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9]}]  # fmt: skip
    categories = [{"id": 9, "name": "ostrich"}, {"id": 281, "name": "tabby"}]
    root = write_json(tmp_path, {"class_index": 281, "hard": True}, categories, boxes)
    (trial,) = PictureFolder(root)[0].trials
    assert (trial.target, trial.region.tolist(), trial.difficult) == (281, [[1, 2, 4, 6]], True)


def test_categories_may_carry_the_models_indices(tmp_path):
    boxes = [{"image_id": 1, "category_id": c, "bbox": [c, 0, 5, 5]} for c in (1, 2)]
    categories = [{"id": 1, "name": "bird", "imagenet_indices": [10, 11]},
                  {"id": 2, "name": "person", "imagenet_indices": []}]  # fmt: skip
    benchmark = PictureFolder(write_json(tmp_path, {}, categories, boxes), index_key="imagenet_indices")
    (trial,) = benchmark[0].trials
    assert (trial.target, trial.difficult, benchmark.class_names[10]) == (10, True, "bird")


def test_a_damaged_picture_is_a_clear_error(voc):
    sample = VOC07(voc)[0]
    sample.path.write_bytes(sample.path.read_bytes()[:200])
    with pytest.raises(BrokenSampleError, match=r"000001\.jpg: cannot be read as an image"):
        read_picture(sample)


def test_a_picture_of_another_size_than_annotated_is_a_clear_error(voc):
    sample = VOC07(voc)[0]
    photograph("chelsea", width=50).save(sample.path)
    with pytest.raises(BrokenSampleError, match="the image is 33x50 px"):
        read_picture(sample)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("<annotation>")])
def test_a_missing_or_damaged_annotation_is_a_clear_error(voc, damage):
    damage(voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000002.xml")
    with pytest.raises(BrokenSampleError, match=r"000002\.xml: cannot be read"):
        VOC07(voc)[1]


def test_covered_counts_overlaps_once():
    boxes = torch.tensor([[0.0, 0, 5, 10], [0, 0, 10, 5]])
    assert covered(boxes, (10, 10)) == pytest.approx(0.75)


def test_benchmarks_travel_to_other_processes(voc):
    assert pickle.loads(pickle.dumps(VOC07(voc)))[1].id == "000002"
