from contextlib import contextmanager

import pytest
from lightning.pytorch.loggers import CSVLogger

from sess_lightning.reporting import publisher as publisher_module
from sess_lightning.reporting.publisher import Publisher
from sess_lightning.reporting.run import RunReport, display_names
from sess_lightning.reporting.sink import Sink


class Shelf(Sink):
    """Keeps what it is given; ``broken`` names the verbs that fail."""

    def __init__(self, name="shelf"):
        self.name, self.kept, self.broken = name, [], set()

    def _keep(self, verb, what):
        if verb in self.broken:
            raise OSError(f"no {verb}")
        self.kept.append((verb, what))

    def write(self, report):
        self._keep("write", report)

    def close(self, report):
        self._keep("close", report)

    def alert(self, title, text):
        self._keep("alert", text)


class Desk:
    """A publisher, its two shelves, and what it told the user."""

    def __init__(self, monkeypatch, folder):
        self.told, self.shelves = [], [Shelf("one"), Shelf("two")]
        waiting = iter(self.shelves)
        monkeypatch.setattr(publisher_module, "sink_for", lambda logger, folder: next(waiting))
        self.publisher = Publisher(self.protect, self.told.append)
        self.training = {}
        self.publisher.connect(
            [CSVLogger(folder)] * 2, folder, prefix="sess", training=self.training, report=False
        )

    @contextmanager
    def protect(self, lost):
        try:
            yield
        except OSError as error:
            self.told.append(f"{error}: {lost}")

    def run(self, epoch, **metrics):
        self.publisher.publish(RunReport("sess", epoch, 10 * epoch, "SESS", {"overall": 0.5}))
        self.publisher.close(metrics)


@pytest.fixture
def desk(monkeypatch, tmp_path):
    return Desk(monkeypatch, tmp_path)


def test_every_sink_gets_the_run_and_at_its_end_the_users_metrics_and_the_alerts(desk):
    desk.publisher.publish(RunReport("sess", 2, 20, "SESS", {"overall": 0.5}))
    desk.publisher.alert("Clever Hans?", "look at a")
    desk.publisher.close({"val/acc": 0.25})
    for shelf in desk.shelves:
        (_, written), alert, (_, closed) = shelf.kept
        assert alert == ("alert", "look at a")
        assert (written.epoch, written.metrics, written.alerts) == (2, {}, ())
        assert (closed.epoch, closed.metrics, closed.alerts) == (2, {"val/acc": 0.25}, ("look at a",))
    assert desk.told == []


def test_a_run_is_closed_once_and_its_alerts_stay_its_own(desk):
    desk.publisher.close({})
    desk.publisher.publish(RunReport("sess", 0, 0, "SESS", {}))
    desk.publisher.alert("Clever Hans?", "look at a")
    desk.publisher.close({})
    desk.publisher.close({})
    desk.run(1)
    closed = [what for verb, what in desk.shelves[0].kept if verb == "close"]
    assert [(report.epoch, report.alerts) for report in closed] == [(0, ("look at a",)), (1, ())]


def test_a_sink_that_fails_costs_the_others_nothing(desk):
    desk.shelves[0].broken = {"write", "alert", "close"}
    desk.publisher.publish(RunReport("sess", 0, 0, "SESS", {}))
    desk.publisher.alert("Clever Hans?", "look at a")
    desk.publisher.close({})
    assert [verb for verb, _ in desk.shelves[1].kept] == ["write", "alert", "close"]
    assert desk.told == [
        "no write: pictures are missing in one", "no alert: alert is missing in one",
        "no close: figures are missing in one",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["write", "close"])
def test_after_three_failures_in_a_row_a_sink_is_tried_on_in_silence(desk, verb):
    desk.shelves[0].broken = {verb}
    for epoch in range(5):
        desk.run(epoch)
    assert len(desk.told) == 4
    assert (
        desk.told[3] == "one failed three times in a row; from now on it is tried without further warnings."
    )
    desk.shelves[0].broken = set()
    desk.run(5)
    assert [what.epoch for kind, what in desk.shelves[0].kept if kind == verb] == [5]
    assert len(desk.told) == 4
    desk.shelves[0].broken = {verb}
    desk.run(6)
    assert len(desk.told) == 5


def test_a_sink_that_cannot_be_made_costs_a_warning(monkeypatch, desk, tmp_path):
    def fail(logger, folder):
        raise OSError("no room")

    monkeypatch.setattr(publisher_module, "sink_for", fail)
    desk.publisher.connect([CSVLogger(tmp_path)], tmp_path, prefix="sess")
    assert desk.told == ["no room: pictures are missing in CSVLogger"]
    assert desk.publisher.names == [str(tmp_path / "lightning_logs" / "version_0" / "sess" / "report.html")]


def test_a_training_has_a_name_from_the_start_which_a_checkpoint_may_replace(desk):
    assert desk.training["run"]
    desk.training["run"] = "resumed"
    desk.run(0)
    assert [what.run for _, what in desk.shelves[0].kept] == ["resumed", "resumed"]


def test_methods_are_called_by_what_they_are_or_by_the_name_they_were_given():
    class GradCAM:
        pass

    class SESS:
        pass

    names = display_names({"": SESS(), "base": GradCAM(), "plus plus": GradCAM()})
    assert names == {"": "SESS", "base": "Grad-CAM", "plus plus": "plus plus"}


def test_no_two_methods_are_called_the_same():
    class GradCAM:
        pass

    class SESS:
        pass

    assert display_names({"": GradCAM(), "base": GradCAM()}) == {"": "Grad-CAM", "base": "base"}
    named = {"": SESS(), "base": GradCAM(), "Grad-CAM": GradCAM(), "SESS": GradCAM()}
    assert display_names(named) == {
        "": "SESS", "base": "base", "Grad-CAM": "Grad-CAM", "SESS": "SESS (compared)",
    }  # fmt: skip
