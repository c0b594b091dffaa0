"""What a run that takes long shows, on a clock of the tests' own: no test waits or looks at the time."""

import io
import re
from collections import deque
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from callbacks import quick
from lightning_models import Classifier, boxed, fit, squares, trainer, validate
from sess_lightning import SESS, SESSCallback
from sess_lightning.callback import bars, pace
from sess_lightning.callback.guard import SESSWarning
from sess_lightning.callback.pace import Laps, TrainingClock
from sess_lightning.callback.plan import RunPlan
from sess_lightning.callback.progress import in_words, remedies
from sess_lightning.introspection import layers
from sess_lightning.methods import RISE, GradCAM, IntegratedGradients


class Clock:
    """Goes on by ``step`` seconds with each forward pass of a ``Timed`` module, and not by itself."""

    def __init__(self):
        self.seconds, self.step = 0.0, 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "now", clock)
    monkeypatch.setattr(Timed, "clock", clock)
    monkeypatch.setattr("sess_lightning.batching.MOST_ON_CPU", 8)  # Many batches, as of large images.
    return clock


class Timed(Classifier):
    """Takes a second for a training step, and ``clock.step`` for each forward pass of an explanation."""

    clock = None

    def forward(self, images):
        self.clock.seconds += self.clock.step
        return super().forward(images)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.clock.seconds += 1
        return loss


@pytest.fixture
def shown(monkeypatch):
    """What bars were made to show."""
    steps = []

    class Spy:
        def is_beside(self, trainer):
            return True

        def show(self, done, total):
            steps.append((done, total))

        def hide(self):
            steps.append("hidden")

    monkeypatch.setattr("sess_lightning.callback.progress.bar_beside", lambda trainer, name: Spy())
    return steps


LONGER = {"num_samples": 4, "method": SESS(GradCAM(), num_scales=3)}


@pytest.mark.usefixtures("whole_curves")
@pytest.mark.parametrize("run", [fit, validate])
def test_a_long_run_shows_how_far_it_is_and_then_goes_away(tmp_path, clock, shown, run):
    clock.step = 0.5
    run(tmp_path, quick(**LONGER), module=Timed)
    *steps, last = shown
    assert last == "hidden"
    done = [step[0] for step in steps]
    (total,) = {step[1] for step in steps}
    assert done == sorted(done)
    assert 0 < done[0] < total
    # The budget is an upper bound: layers were known already.
    assert total - 10 <= done[-1] <= total


def test_a_short_run_shows_nothing(tmp_path, clock, shown):
    clock.step = 0.01
    fit(tmp_path, quick(**LONGER), module=Timed, max_epochs=2)
    assert set(shown) <= {"hidden"}


def test_the_second_run_begins_at_nothing_again(tmp_path, clock, shown):
    clock.step = 0.5
    fit(tmp_path, quick(**LONGER), module=Timed, max_epochs=2)
    first = shown.index("hidden")
    assert 0 < shown[0][0] < 100
    assert 0 < shown[first + 1][0] < 100


def test_seconds_are_said_while_the_first_run_goes_on_and_once_only(tmp_path, clock, told):
    clock.step = 0.5
    fit(tmp_path, quick(**LONGER), module=Timed, max_epochs=3)
    said = [line for line in told() if "a run takes" in line and "training" not in line]
    (line,) = said
    assert line.startswith("SESSCallback: a run takes about ")
    done, total = (int(text.replace(",", "")) for text in re.findall(r"first ([\d,]+) of ([\d,]+)", line)[0])
    assert done >= min(64, total / 4)  # A few slow ones at the start say nothing.


@pytest.mark.parametrize("method", [None, SESS(GradCAM(), num_scales=3)], ids=["default", "given"])
def test_what_finding_a_layer_takes_is_not_charged_to_each_forward_pass(
    tmp_path, clock, told, monkeypatch, method
):
    search = layers.search

    def takes(seconds):
        def slow(*arguments):
            clock.seconds += seconds
            return search(*arguments)

        return slow

    clock.step = 0.5
    for seconds in (0, 1000):
        monkeypatch.setattr(layers, "search", takes(seconds))
        fit(tmp_path / str(seconds), quick(num_samples=4, method=method), module=Timed)
    lines = [line for line in told() if "a run takes about" in line]
    assert len(lines) == 2
    assert len({*lines}) == 1


@pytest.mark.parametrize(
    "methods",
    [
        {"method": IntegratedGradients(steps=20)},
        {"method": SESS(IntegratedGradients(steps=20), num_scales=1)},
        {"method": RISE(num_masks=40)},
        {"compare": {"slow": IntegratedGradients(steps=20)}},
    ],
    ids=["many passes", "many in a window", "masks", "beside it"],
)
def test_where_passes_are_not_seen_a_run_is_said_when_it_is_over(tmp_path, clock, told, methods):
    clock.step = 0.5
    validate(tmp_path, quick(num_samples=4, **methods), module=Timed)
    (line,) = [line for line in told() if "a run takes" in line]
    assert "about" not in line
    # The validation itself passes four batches.
    assert float(re.findall(r"takes ([\d.]+) s", line)[0]) == pytest.approx(clock.seconds - 2, abs=0.1)


def test_a_short_run_is_said_when_it_is_over_with_what_it_took(tmp_path, clock, told):
    clock.step = 0.01
    validate(tmp_path, quick(**LONGER), module=Timed)
    (line,) = [line for line in told() if "a run takes" in line]
    assert line.removeprefix("SESSCallback: a run takes ").endswith(" s.")
    assert float(line.split()[-2]) == pytest.approx(clock.seconds, abs=0.1)


def test_runs_that_take_longer_than_the_training_are_warned_of_once_with_what_helps(tmp_path, clock):
    clock.step = 2.0
    with pytest.warns(SESSWarning, match="a run takes") as warned:
        fit(tmp_path, quick(**{**LONGER, "num_samples": 12}), module=Timed, max_epochs=3)
    (text,) = [str(one.message) for one in warned if "a run takes" in str(one.message)]
    # Four steps of a second, each with a forward pass of two.
    assert "and the training between two runs takes 12 s. SESSCallback(" in text
    assert "every_n_epochs=" in text
    assert "SESS(..., prefilter_ratio=0.9, coarse_to_fine=0.3) skips windows." in text


@pytest.mark.parametrize(
    ("step", "options"), [(0.05, {}), (0.01, {"val_check_interval": 2}), (2.0, {"fast_dev_run": True})]
)
def test_runs_that_take_less_are_not(tmp_path, clock, recwarn, step, options):
    clock.step = step
    fit(tmp_path, quick(**LONGER), module=Timed, **{"max_epochs": 2, **options})
    assert not [one for one in recwarn if "training between" in str(one.message)]


class Deaf(SESSCallback):
    """Somebody's own callback, whose hook forgets its parent's."""

    def on_train_epoch_start(self, trainer, pl_module):
        pass


def test_a_training_that_was_not_measured_is_compared_with_nothing(tmp_path, clock, recwarn):
    clock.step = 2.0
    fit(tmp_path, Deaf(**LONGER, compare={}, on_error="raise"), module=Timed, max_epochs=2)
    assert not [one for one in recwarn if "training between" in str(one.message)]


@pytest.mark.parametrize(("seconds", "warned"), [([50, 0, 0], 0), ([50, 20, 0], 1), ([0, 5, 30], 1)])
def test_what_only_the_first_run_takes_is_not_held_against_it(
    tmp_path, clock, shelf, monkeypatch, recwarn, seconds, warned
):
    left = iter(seconds)
    monkeypatch.setattr(shelf, "write", lambda report: setattr(clock, "seconds", clock.seconds + next(left)))
    fit(tmp_path, quick(report=False), module=Timed, max_epochs=3)
    assert len([one for one in recwarn if "the training between two runs" in str(one.message)]) == warned


def test_a_rare_run_is_measured_against_all_epochs_it_stands_for():
    clock = TrainingClock()
    clock._seconds, clock._epochs = 10.0, 1
    assert clock.between(runs=1, every_n_epochs=1) == 10
    assert clock.between(runs=1, every_n_epochs=5) == 50
    clock._seconds, clock._epochs = 60.0, 6
    assert clock.between(runs=2, every_n_epochs=5) == 30


def test_validation_is_no_training(tmp_path, clock):
    clock.step = 3.0
    callback = quick()
    its = fit(tmp_path, callback, module=Timed, max_epochs=2)
    callback.clock.pause()
    # Two epochs of four steps: a second, and a forward pass of three, each.
    assert callback.clock._seconds == 2 * 4 * (1 + 3)
    assert its.current_epoch == 2


@pytest.mark.parametrize("prefix", ["sess", "other"])
def test_tqdm_gets_a_line_below_its_own(tmp_path, clock, capsys, monkeypatch, prefix):
    clock.step = 0.5
    monkeypatch.setattr(bars.Tqdm, "monitor_interval", 0)
    fit(tmp_path, TQDMProgressBar(), quick(**LONGER, prefix=prefix), module=Timed, enable_progress_bar=True)
    out = capsys.readouterr().out
    assert ("SESS:" if prefix == "sess" else "SESS (other):") in out
    assert "Epoch 0: 100%" in out


def test_rich_gets_a_task_which_later_runs_use_again(tmp_path, clock):
    clock.step = 0.5
    rich, seen = RichProgressBar(), []

    class Look(Timed):
        def on_validation_epoch_end(self):
            seen.append([(task.description, task.visible) for task in rich.progress.tasks])

    fit(tmp_path, rich, quick(**LONGER), module=Look, enable_progress_bar=True, max_epochs=3,
        num_sanity_val_steps=0)  # fmt: skip
    ours = [[visible for name, visible in tasks if name == "SESS"] for tasks in seen]
    assert ours == [[False]] * 3
    # Lightning finds its tasks by their places.
    assert rich.train_progress_bar.description.startswith("Epoch 2")
    assert rich.val_progress_bar.description.startswith("Validation")


class Own(ProgressBar):
    """Somebody's own bar, of no make that is known."""

    def __init__(self):
        super().__init__()
        self.is_on = True

    def disable(self):
        self.is_on = False


class OwnTqdm(TQDMProgressBar):
    """Somebody's own, which inherits."""


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (TQDMProgressBar, bars.TqdmBar), (OwnTqdm, bars.TqdmBar), (RichProgressBar, bars.RichBar),
        (Own, None),
        (lambda: None, None), (lambda: TQDMProgressBar(refresh_rate=0), None),
        (lambda: RichProgressBar(refresh_rate=0), None),
    ],
)  # fmt: skip
def test_there_is_a_bar_where_lightning_shows_one_of_a_known_make(tmp_path, monkeypatch, make, kind):
    theirs = make()
    its = trainer(tmp_path, *filter(None, [theirs]), enable_progress_bar=theirs is not None)
    assert type(bars.bar_beside(its, "SESS")) is (kind or type(None))
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    assert bars.bar_beside(its, "SESS") is None


@pytest.mark.parametrize("own", [True, False])
def test_where_bars_are_off_or_of_another_make_a_long_run_shows_none(tmp_path, clock, capsys, own):
    clock.step = 0.5
    bar = [Own()] if own else []
    its = fit(tmp_path, *bar, quick(**LONGER), module=Timed, enable_progress_bar=own)
    assert "SESS" not in capsys.readouterr().out
    assert its.callback_metrics["sess/failed"] == 0


@pytest.mark.parametrize("verb", ["is_beside", "show", "hide"])
def test_a_bar_that_fails_costs_nothing_else(tmp_path, clock, monkeypatch, verb):
    clock.step = 0.5

    def fails(*_):
        raise RuntimeError("no terminal")

    bar = SimpleNamespace(is_beside=lambda _: True, show=lambda *_: None, hide=lambda: None)
    setattr(bar, verb, fails)
    monkeypatch.setattr("sess_lightning.callback.progress.bar_beside", lambda *_: bar)
    its = fit(tmp_path, quick(**LONGER), module=Timed, max_epochs=2)
    assert its.callback_metrics["sess/failed"] == 0
    assert its.callback_metrics["sess/n"] == 4


def test_a_clock_that_fails_costs_nothing_else(tmp_path, monkeypatch):
    def fails(device):
        raise RuntimeError("no clock")

    monkeypatch.setattr("sess_lightning.callback.progress.Laps", fails)
    its = fit(tmp_path, quick(), max_epochs=2)
    assert its.callback_metrics["sess/failed"] == 0


@pytest.mark.usefixtures("whole_curves")
def test_an_error_within_a_run_takes_the_bar_away(tmp_path, clock, shown):
    clock.step = 0.5

    class Fails(Timed):
        def forward(self, images):
            if not self.training and self.clock.seconds > 30:
                raise RuntimeError("out of luck")
            return super().forward(images)

    with pytest.warns(SESSWarning, match="out of luck"):
        validate(tmp_path, quick(**LONGER, on_error="warn"), module=Fails, val=squares(read=boxed))
    assert shown[-1] == "hidden"


def test_other_ranks_watch_nothing(tmp_path, monkeypatch, shown):
    its, callback = trainer(tmp_path), quick()
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    with callback.progress.watch(its, torch.device("cpu"), Mock(RunPlan)):
        assert callback.progress._laps is None
    callback.progress.end_run(its)
    assert shown == []


class Event:
    """An event of a device that is over when a test says so; waiting for it is an error."""

    over: ClassVar = deque()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.over.append([self, None])

    def query(self):
        return any(event is self and at is not None for event, at in Event.over)

    def elapsed_time(self, other):
        (start,), (end,) = ([at for event, at in Event.over if event is one] for one in (self, other))
        return 1000 * (end - start)

    def synchronize(self):
        pytest.fail("somebody waits")


def test_on_a_device_batches_count_once_they_turn_out_to_be_done(monkeypatch):
    Event.over.clear()
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    laps = Laps(torch.device("cuda"))
    laps.add(8)
    laps.add(8)
    assert (laps.sent, laps.done, laps.rate(0.0)) == (16, 0, None)
    for i, at in enumerate((10.0, 12.0, 13.0)):
        Event.over[i][1] = at
    laps.add(4)
    assert (laps.sent, laps.done, laps.seconds, laps.first) == (20, 16, 3.0, (8, 2.0))
    # The first batch warms up: 8 items in the one second after it.
    assert laps.rate(1.0) == 1 / 8
    assert laps.rate(1.5) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.2, "4.2 s"),
        (42.4, "42 s"),
        (130.0, "2 min"),
        (3000.0, "50 min"),
        (9000.0, "2.5 h"),
    ],
)
def test_durations_have_two_digits_or_so(seconds, text):
    assert in_words(seconds) == text


@pytest.mark.parametrize(
    ("options", "ratio", "text"),
    [
        ({}, 2.0, "SESSCallback(num_samples=16) or SESSCallback(every_n_epochs=2) takes no longer than the "
                  "training; SESS(..., prefilter_ratio=0.9, coarse_to_fine=0.3) skips windows."),
        ({"every_n_epochs": 3, "method": GradCAM()}, 1.5,
         "SESSCallback(num_samples=21) or SESSCallback(every_n_epochs=6) takes no longer than the training."),
        ({"method": SESS(GradCAM(), coarse_to_fine=0.3)}, 20.0,
         "SESSCallback(every_n_epochs=20) takes no longer than the training."),
    ],
)  # fmt: skip
def test_the_advice_is_arithmetic(options, ratio, text):
    settings = quick(**{"method": None, **options}).settings
    assert remedies(Mock(RunPlan, details={"samples": 32}), settings, ratio) == text


def test_a_callback_whose_bar_is_shown_can_be_sent_to_another_process():
    import pickle

    callback = quick()
    callback.progress._bar = io.StringIO
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.progress._bar is None
    assert copy.progress._guard is copy.guard
