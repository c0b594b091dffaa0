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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["runs"][0].pop("small"), "small"),
        (lambda state: state["runs"][0].update(weather="fine"), "weather"),
        (lambda state: state["selection"].update(mood=1), "mood"),
    ],
)
def test_a_checkpoint_of_another_version_is_resumed_with_one_line(change, named):
    first, second = quick(), quick()
    small = torch.zeros(2, 4, 4)
    first.history.runs = [Run(0, 3, (1, 2), dict.fromkeys(FIGURES, small[:, 0, 0]), small)]
    state = first.state_dict()
    change(state)
    with pytest.warns(SESSWarning, match=rf"the checkpoint is of another version \({named}\)") as caught:
        second.load_state_dict(state)
    assert len(caught) == 1


def test_a_checkpoint_that_holds_nothing_is_no_reason_to_warn(recwarn):
    quick().load_state_dict({})
    assert not recwarn.list
