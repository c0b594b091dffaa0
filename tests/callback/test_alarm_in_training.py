import re
from html import escape

import pytest

from callbacks import Straying, Watched, quick, straying
from lightning_models import (
    boxed,
    fit,
    squares,
)
from sess_lightning.reporting.report.records import read
from sess_lightning.types import SESSWarning
from wandb_reader import history, records, run_folder


def alarms(caught):
    return [str(each.message) for each in caught if "Clever Hans?" in str(each.message)]


def test_the_alarm_rings_once_when_accuracy_rises_while_the_maps_leave_the_object(
    tmp_path, recwarn, wandb_logger
):
    fit(
        tmp_path, straying(), module=Watched, val=squares(read=boxed), max_epochs=3, logger=wandb_logger,
        num_sanity_val_steps=0,
    )  # fmt: skip
    (text,) = alarms(recwarn)
    assert "val_acc is 0.800 at step 7" in text
    assert "relevance mass fell from 1.000 (step 3, val_acc 0.600)" in text
    assert re.search(r"Look at: sample \d+, ", text)
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    (path,) = folder.glob("run-*.wandb")
    (alert,) = [each.alert for each in records(path) if each.WhichOneof("record_type") == "alert"]
    assert alert.text in text
    (page,) = tmp_path.glob("**/report.html")
    (record,) = [each for each in read(page.parent / "records") if each.alerts]
    assert (record.step, record.alerts) == (7, [alert.text])
    assert escape(alert.text) in page.read_text("utf-8")
    drifts = [row["sess/drift_previous"] for row in history(folder) if "sess/drift_previous" in row]
    assert drifts == pytest.approx([-1, 1], abs=1e-3)  # The first run has nothing to be compared with.


@pytest.mark.parametrize("kwargs", [{"method": Straying(loyal=999)}, {"alarm": False}])
def test_the_alarm_is_silent_while_the_maps_stay_or_where_it_is_off(tmp_path, recwarn, kwargs):
    fit(tmp_path, straying(**kwargs), module=Watched, val=squares(read=boxed), max_epochs=2,
        num_sanity_val_steps=0)  # fmt: skip
    assert alarms(recwarn) == []


@pytest.mark.parametrize("name", ["accuracy", "alarm"])
def test_an_accuracy_that_is_not_logged_is_said_once(tmp_path, name):
    with pytest.warns(SESSWarning, match="accuracy='val_top1' is not among the logged keys") as caught:
        fit(tmp_path, quick(**{name: "val_top1"}), val=squares(read=boxed), max_epochs=2)
    assert len([each for each in caught if "val_top1" in str(each.message)]) == 1


def test_a_resumed_training_compares_with_the_runs_before(tmp_path, recwarn):
    first = straying()
    fit(tmp_path, first, module=Watched, val=squares(read=boxed), num_sanity_val_steps=0)
    second = straying(method=Straying(loyal=0))
    second.load_state_dict(first.state_dict())
    module = Watched()
    module.accuracy = 0.6
    fit(tmp_path, second, module=module, val=squares(read=boxed), num_sanity_val_steps=0)
    assert len(alarms(recwarn)) == 1


class Percent(Watched):
    """Logs its accuracy in percent, of two loaders that differ."""

    def log(self, name, value, **kwargs):
        super().log(name, 100 * value if name == "val_acc" else value, **kwargs)


class TwoLoaders(Watched):
    """Logs an accuracy of each loader, and that of the first stays."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        rising = (0.5, 0.6 + 0.2 * self.current_epoch)[dataloader_idx]
        self.log("val_acc", rising, batch_size=len(batch[0]))

    def on_validation_epoch_end(self):
        pass


@pytest.mark.parametrize("module", [Watched, Percent])
def test_accuracy_may_be_a_share_or_in_percent(tmp_path, recwarn, module):
    its = fit(tmp_path, straying(), module=module, val=squares(read=boxed), max_epochs=3,
              num_sanity_val_steps=0)  # fmt: skip
    (text,) = alarms(recwarn)
    assert "val_acc is 0.800 at step 7" in text
    assert "(step 3, val_acc 0.600)" in text
    metrics = its.callback_metrics  # Selected anew in each run: its accuracy was higher by far.
    assert metrics["sess/selection"].item() == pytest.approx(3 + metrics["sess/relevance_mass"].item())


@pytest.mark.parametrize(("loader", "rings"), [(0, 0), (1, 1)])
def test_the_accuracy_is_that_of_the_watched_loader(tmp_path, recwarn, loader, rings):
    val = [squares(read=boxed), squares(read=boxed)]
    fit(tmp_path, straying(dataloader_idx=loader, accuracy="val_acc"), module=TwoLoaders, val=val,
        max_epochs=2, num_sanity_val_steps=0)  # fmt: skip
    assert len(alarms(recwarn)) == rings


class Mistaken(Watched):
    """Logs how many it gets wrong, in percent."""

    def on_validation_epoch_end(self):
        self.log("val_error", 90.0 - 20 * self.current_epoch)


@pytest.mark.parametrize(("named", "told"), [({}, []), ({"accuracy": "val_error"}, ["names an error rate"])])
def test_errors_are_no_accuracy(tmp_path, recwarn, named, told):
    its = fit(tmp_path, straying(**named), module=Mistaken, val=squares(read=boxed), max_epochs=3,
              num_sanity_val_steps=0)  # fmt: skip
    assert alarms(recwarn) == []
    assert "sess/selection" not in its.callback_metrics
    texts = [str(each.message) for each in recwarn if issubclass(each.category, SESSWarning)]
    assert len(texts) == len(told)
    assert all(part in text for part, text in zip(told, texts, strict=True))


def test_what_is_neither_a_share_nor_in_percent_is_no_accuracy(tmp_path):
    class Counting(Watched):
        def on_validation_epoch_end(self):
            self.log("val_acc", 1234.0)

    with pytest.warns(SESSWarning, match="val_acc is 1234, which is neither a share nor a percentage"):
        its = fit(tmp_path, straying(), module=Counting, val=squares(read=boxed))
    assert "sess/selection" not in its.callback_metrics


def test_a_doubt_lists_the_users_own_keys_only(tmp_path):
    two = quick(accuracy="val_top1"), quick(prefix="second", alarm=False)
    with pytest.warns(SESSWarning, match="is not among the logged keys") as caught:
        fit(tmp_path, *two, val=squares(read=boxed))
    (text,) = [str(each.message) for each in caught if "val_top1" in str(each.message)]
    assert "logged keys (val_loss);" in text
