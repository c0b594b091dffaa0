import errno
import re
import signal
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from callbacks import Broken, Spy, Talkative, quick
from lightning_models import (
    Classifier,
    fit,
    validate,
)
from sess_lightning import SESSCallback
from sess_lightning.callback.guard import RunGuard
from sess_lightning.callback.history import RunHistory
from sess_lightning.callback.keeping import SampleKeeper
from sess_lightning.types import SESSWarning


def test_a_run_that_fails_warns_once_and_three_in_a_row_switch_the_callback_off(tmp_path):
    broken = Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        its = fit(tmp_path, SESSCallback(broken, num_samples=16), max_epochs=5, num_sanity_val_steps=0)
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    assert [text.split(": ", 1)[0] for text in told] == [
        "SESSCallback (process 0, epoch 0)", "SESSCallback (process 0, epoch 1)",
        "SESSCallback (process 0, epoch 2)", "SESSCallback (process 0, epoch 2)",
    ]  # fmt: skip
    assert all("RuntimeError: out of luck. Training goes on" in text for text in told[:3])
    assert "three runs failed in a row; SESSCallback is off" in told[3]
    assert len(broken.calls) == 3
    assert its.logger.of("sess/failed") == [1, 2, 3]
    assert its.current_epoch == 5


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "AssertionError. Training"),
        (ValueError("no"), "ValueError: no. Training"),
        (ValueError("Use what?\n"), "ValueError: Use what? Training"),
    ],
    ids=repr,
)
def test_an_error_is_said_in_whole_sentences(error, said):
    with pytest.warns(SESSWarning, match=rf"epoch 0\): {re.escape(said)} goes on"), RunGuard().protect():
        raise error


def test_of_two_callbacks_it_is_said_which_one_fails(tmp_path, told):
    callback = SESSCallback(Broken(), num_samples=4, prefix="other")
    with pytest.warns(SESSWarning, match=r"^SESSCallback\(prefix='other'\) \(process 0, epoch 0\): Runtime"):
        fit(tmp_path, quick(), callback)
    lines = [line for line in told() if "each run explains" in line or "a run takes" in line]
    assert sorted(line.split(": ", 1)[0] for line in lines) == [
        "SESSCallback", "SESSCallback", "SESSCallback(prefix='other')"
    ]  # fmt: skip


def test_a_run_that_has_failed_explains_nothing_more(tmp_path):
    passed = []

    def adapt(batch):
        passed.append(batch)
        if len(passed) == 2:
            raise KeyError("label")
        return batch

    spy = Spy()
    callback = SESSCallback(spy, num_samples=16, compare={}, batch_adapter=adapt)
    with pytest.warns(SESSWarning, match="batch_adapter=, called with one of validation's batches") as told:
        validate(tmp_path, callback)
    assert sum(each.category is SESSWarning for each in told) == 1
    assert len(passed) == 2
    assert spy.targets == []


def test_the_next_start_gives_the_callback_another_chance(tmp_path):
    callback = SESSCallback(Broken(until=3), num_samples=4)
    with pytest.warns(SESSWarning) as caught:
        fit(tmp_path, callback, max_epochs=3)
    assert "is off" in str(caught[-1].message)
    assert validate(tmp_path, callback).logger.of("sess/n") == [4]


def test_a_failure_between_two_good_runs_is_forgiven_and_counted(tmp_path):
    class Moody(Classifier):
        def forward(self, images):
            if not self.training and self.trainer.current_epoch == 1:
                raise RuntimeError("not today")
            return super().forward(images)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 0.5)

    with pytest.warns(SESSWarning, match="RuntimeError: not today"):
        its = fit(tmp_path, quick(on_error="warn"), module=Moody, max_epochs=3)
    assert [row["epoch"] for row in its.logger.rows if "sess/overall" in row] == [0, 2]
    assert its.logger.of("sess/failed") == [0, 1, 1]


def test_warnings_that_are_errors_do_not_end_the_training(tmp_path, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SESSWarning)
        its = fit(tmp_path, SESSCallback(Broken(), num_samples=4))
    assert its.current_epoch == 1
    assert any("out of luck" in text for text in told())


def test_errors_are_raised_where_asked_for(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, SESSCallback(Broken(), on_error="raise"))


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_an_interrupt_ends_the_training_and_the_module_is_given_back(tmp_path):
    broken = Broken(error=KeyboardInterrupt)
    module, handler = Talkative(), signal.getsignal(signal.SIGINT)
    module.net[1].eval()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(tmp_path, Calm(), SESSCallback(broken, num_samples=4), module=module, num_sanity_val_steps=0)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones.
    assert len(broken.calls) == 1
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), Calm.state)
    assert {"log", "log_dict"}.isdisjoint(vars(module))
    assert not [each for each in module.modules() if each._forward_hooks or each._forward_pre_hooks]
    assert all(parameter.requires_grad for parameter in module.parameters())


class Calm(Callback):
    """Notes torch's generator before the explanations."""

    def on_validation_batch_end(self, *args, **kwargs):
        type(self).state = torch.get_rng_state()


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy(), "parameters are sharded"),
        (ModelParallelStrategy(), "layers are split between processes"),
        (ModelParallelStrategy(tensor_parallel_size=2), "layers are split between processes"),
        (SimpleNamespace(zero_stage_3=True), "parameters are sharded"),
    ],
    ids=["FSDP", "tensors by default", "tensors", "DeepSpeed"],
)
def test_what_is_not_safe_is_refused_before_the_training_begins(strategy, reason, unchecked):
    told = f"does not work with {type(strategy).__name__}: {reason}"
    with pytest.raises(ValueError, match=told):
        SESSCallback().setup(SimpleNamespace(strategy=strategy), None, "fit")


def test_no_tensor_outlives_an_error(tmp_path):
    callback = SESSCallback(Broken(), num_samples=4)
    with pytest.warns(SESSWarning):
        fit(tmp_path, callback)
    assert not [
        value for value in vars(callback).values() if isinstance(value, (BaseException, torch.Tensor))
    ]


class Impatient:
    """Handlers of a signal in the forms people give them."""

    def __call__(self, number, frame):
        raise TimeoutError("the time is over")

    def method(self, number, frame):
        self(number, frame)


@pytest.mark.parametrize(
    "handler",
    [lambda number, frame: Impatient()(number, frame), Impatient(), Impatient().method,
     partial(Impatient.method, Impatient())],
    ids=["function", "object", "method", "partial"],
)  # fmt: skip
def test_what_a_signal_handler_raises_ends_the_training(tmp_path, handler):
    class Late(Spy):
        def explain(self, model, images, targets):
            signal.raise_signal(signal.SIGALRM)
            return super().explain(model, images, targets)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(TimeoutError, match="the time is over"):
            fit(tmp_path, SESSCallback(Late(), num_samples=4, compare={}))
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (TimeoutError("timed out"), "the logger's server can be reached"),
        (ConnectionResetError("reset by peer"), "the logger's server can be reached"),
        (OSError(errno.ENOSPC, "no space"), "the disk has room"),
        (PermissionError(errno.EACCES, "denied"), "the folder may be written to"),
        (OSError("image file is truncated"), 'on_error="raise"'),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), "need less memory"),
        (MemoryError(), "need less memory"),
        (KeyError("x"), 'on_error="raise"'),
    ],
    ids=repr,
)
def test_the_remedy_fits_the_error(error, remedy):
    guard = RunGuard()
    with pytest.warns(SESSWarning, match=re.escape(remedy)), guard.protect():
        raise error


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("part", [RunHistory, SampleKeeper])
@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict"])
def test_a_state_that_cannot_be_written_or_read_does_not_end_the_training(tmp_path, monkeypatch, part, verb):
    def fail(*_):
        raise RuntimeError("no state")

    kept = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, quick(), kept)
    monkeypatch.setattr(part, verb, fail)
    again = ModelCheckpoint(tmp_path / "again", save_last=True)
    with pytest.warns(SESSWarning, match="no state. Training goes on; this run's state"):
        its = fit(tmp_path, quick(on_error="warn"), again, max_epochs=2, ckpt_path=kept.last_model_path)
    assert its.logger.of("sess/n") == [4]
    assert "failed" in torch.load(again.last_model_path)["callbacks"]["SESSCallback[prefix='sess']"]
