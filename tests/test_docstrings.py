"""The examples in docstrings are run, and whoever looks for one finds it."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import sess_lightning
from sess_lightning import SESSCallback, methods, metrics
from sess_lightning.metrics import functional

MODULES = [
    module.name
    for module in pkgutil.walk_packages(sess_lightning.__path__, "sess_lightning.")
    if not module.name.endswith(("__main__", "commands"))
]
SHOWN = [
    SESSCallback,
    *(getattr(methods, name) for name in methods.__all__),
    *(getattr(metrics, name) for name in metrics.__all__),
    *(
        value
        for name in functional.__all__
        if callable(value := getattr(functional, name)) and name[0].islower()
    ),
]


def prepared(module):
    """Return the names that the examples of a module's package begin with: its own docstring's."""
    package = importlib.import_module(module.rpartition(".")[0])
    (test, *_) = doctest.DocTestFinder(recurse=False).find(package)
    doctest.DocTestRunner(verbose=False).run(test, out=str, clear_globs=False)
    return test.globs


def examples(module):
    names = prepared(module)
    tests = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_give_what_they_say(module):
    said = []
    for example in examples(module):
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert "".join(said) == ""


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.__name__)
def test_every_method_metric_and_function_shows_an_example(shown):
    assert ">>>" in inspect.getdoc(shown)


def test_a_wrong_example_is_noticed():
    said = []
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert "Expected:\n    3\nGot:\n    2" in "".join(said)
