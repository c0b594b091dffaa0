import io

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import (
    Broken,
    Watch,
    quick,
)
from lightning_models import (
    boxed,
    fit,
    squares,
)
from sess_lightning.callback.runs import FIGURES, Run
from sess_lightning.types import SESSWarning


def test_the_state_is_loadable_with_weights_only(tmp_path):
    callback = quick()
    its = fit(tmp_path, callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["last"]["overall"] == pytest.approx(its.logger.of("sess/overall")[0])
    other = quick()
    other.load_state_dict(loaded)
    for name in ("last", "failed", "alarmed"):
        assert other.state_dict()[name] == callback.state_dict()[name] == loaded[name]
    (run,), (own,) = other.state_dict()["runs"], callback.state_dict()["runs"]
    assert torch.equal(run["small"], own["small"])
    assert run["samples"] == own["samples"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    def callbacks(folder):
        checkpoint = ModelCheckpoint(tmp_path / folder, monitor="sess/overall", mode="max", save_last=True)
        return (
            quick(every_n_epochs=2),
            Watch(),
            EarlyStopping("sess/overall", mode="max", patience=10),
            checkpoint,
        )

    straight = fit(tmp_path, *callbacks("straight"), max_epochs=3, train=squares())
    first = fit(tmp_path, *callbacks("first"), max_epochs=1, train=squares())
    watch = callbacks("second")
    resumed = fit(
        tmp_path, *watch, max_epochs=3, train=squares(), ckpt_path=first.checkpoint_callback.last_model_path
    )
    (at_0,) = first.logger.of("sess/overall")
    assert watch[1].found == pytest.approx([at_0, resumed.logger.of("sess/overall")[0]])
    assert straight.logger.of("sess/overall")[0] == at_0
    assert [row["epoch"] for row in resumed.logger.rows if "sess/overall" in row] == [2]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_and_resumed_run_shows_the_same_panel_though_the_loader_shuffles(tmp_path, shelf):
    def callbacks():
        return quick(num_images=3), ModelCheckpoint(tmp_path / "kept", save_last=True)

    first = fit(tmp_path, *callbacks(), val=squares(shuffle=True, read=boxed))
    path = first.checkpoint_callback.last_model_path
    torch.load(path, weights_only=True)
    torch.manual_seed(7)
    its = fit(tmp_path, *callbacks(), max_epochs=2, val=squares(shuffle=True, read=boxed), ckpt_path=path)
    (_, _, before), (_, when, after) = shelf.shown
    assert when == {"epoch": 1, "step": 7}
    assert len(before) == len(after) == 3
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.image, other.image)
        assert (one.boxes, one.title) == (other.boxes, other.title)
    assert its.logger.of("sess/failed") == [0]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_pictures_are_in_the_checkpoint_only_where_the_loader_shuffles(tmp_path):
    ordered, shuffled = quick(), quick()
    fit(tmp_path, ordered)
    fit(tmp_path, shuffled, val=squares(shuffle=True))
    assert "kept" not in ordered.state_dict()
    assert sum(len(fields["labels"]) for fields, _ in shuffled.state_dict()["kept"].values()) == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_counters_go_on_after_a_resume(tmp_path):
    def callbacks():
        checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True)
        return quick(method=Broken(), compare={}, on_error="warn"), checkpoint

    with pytest.warns(SESSWarning):
        first = fit(tmp_path, *callbacks())
    path = first.checkpoint_callback.last_model_path
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, *callbacks(), max_epochs=2, ckpt_path=path)
    assert its.logger.of("sess/failed") == [2]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_other_settings_can_be_resumed(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "first", save_last=True)
    fit(tmp_path, quick(), checkpoint)
    its = fit(
        tmp_path, quick(num_samples=8), ModelCheckpoint(tmp_path / "second", save_last=True), max_epochs=2,
        ckpt_path=checkpoint.last_model_path,
    )  # fmt: skip
    assert its.logger.of("sess/n") == [8]


def remembering():
    """A callback with a run behind it and samples of a shuffled loader."""
    callback, small = quick(), torch.zeros(2, 4, 4)
    figures = dict.fromkeys((*FIGURES, "region_share"), small[:, 0, 0])
    callback.history.runs = [Run(0, 3, (1, 2), figures, small)]
    kept = {"images": torch.rand(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    callback.keeper.load_state_dict({"kept": {0: (kept, [0, 1])}, "chosen": {0: 2}})
    return callback


def of(part, *path):
    """Return what a state holds below keys and indices."""
    for key in path:
        part = part[key]
    return part


CHANGES = {
    "a field of a run is missing": (lambda state: of(state, "runs", 0).pop("small"), "small"),
    "a field of a run is unknown": (lambda state: of(state, "runs", 0).update(weather="fine"), "weather"),
    "a run is none": (lambda state: state.update(runs=[7]), "run"),
    "runs are none": (lambda state: state.update(runs="none"), "runs"),
    "an epoch of a run is a text": (lambda state: of(state, "runs", 0).update(epoch="1"), "run"),
    "a run has figures of another name": (
        lambda state: of(state, "runs", 0).update(figures={"mass": torch.zeros(2)}), "run",
    ),
    "a run has figures of another length": (
        lambda state: of(state, "runs", 0, "figures").update(overall=torch.zeros(3)), "run",
    ),
    "selection has an unknown field": (lambda state: state["selection"].update(mood=1), "mood"),
    "selection holds a text": (lambda state: state["selection"].update(best="best"), "selection"),
    "selection is a list": (lambda state: state.update(selection=[1]), "selection"),
    "the count of failures is a text": (lambda state: state.update(failed="two"), "failed"),
    "the epoch is a list": (lambda state: state.update(epoch=[1]), "epoch"),
    "the scores are a list": (lambda state: state.update(last=[1]), "last"),
    "the training is a text": (lambda state: state.update(history="a"), "history"),
    "a field is unknown": (lambda state: state.update(invented_later=1), "invented_later"),
    "a field of the samples is unknown": (
        lambda state: of(state, "kept", 0, 0).update(depth=torch.zeros(2)), "depth",
    ),
    "a field of the samples is missing": (lambda state: of(state, "kept", 0, 0).pop("labels"), "kept"),
    "samples are fewer than their numbers": (lambda state: of(state, "kept", 0, 1).append(2), "kept"),
    "samples are none": (lambda state: state.update(kept={0: None}), "kept"),
    "samples are a list": (lambda state: state.update(kept=[1]), "kept"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_of_another_version_is_resumed_with_one_line(tmp_path, recwarn, case):
    change, named = CHANGES[case]
    state = remembering().state_dict()
    state["kept"] = {i: (dict(values), list(numbers)) for i, (values, numbers) in state["kept"].items()}
    change(state)
    callback = quick(on_error="warn")
    callback.load_state_dict(state)
    its = fit(tmp_path, callback, val=squares(shuffle=True))
    (told,) = [str(each.message) for each in recwarn if issubclass(each.category, SESSWarning)]
    assert (
        f"the checkpoint comes from another version ({named}); earlier runs or samples may be missing" in told
    )
    assert its.logger.of("sess/n") == [4]
    assert its.logger.of("sess/failed") == [0]


@pytest.mark.usefixtures("unchecked")
def test_a_state_that_is_none_at_all_is_resumed_with_one_line():
    with pytest.warns(SESSWarning, match=r"from another version \(no mapping\)") as caught:
        quick().load_state_dict([1, 2])
    assert len(caught) == 1


def test_what_a_checkpoint_holds_besides_is_kept():
    first, second = remembering(), quick()
    state = first.state_dict()
    state["runs"][0]["weather"] = "fine"
    with pytest.warns(SESSWarning, match="weather"):
        second.load_state_dict(state)
    assert [run.step for run in second.history.runs] == [3]
    assert second.state_dict()["kept"][0][1] == [0, 1]


def test_a_checkpoint_that_holds_nothing_is_no_reason_to_warn(recwarn):
    quick().load_state_dict({})
    assert not recwarn.list
