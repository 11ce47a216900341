"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import na_compiler

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(na_compiler.__path__, "na_compiler.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["na_compiler", *MODULES])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs what is not installed here: {error}")
    torch.manual_seed(0)
    # What an example does not import itself is what everybody has imported.
    results = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    for name in na_compiler.__all__:
        if name in {"load_bundle", "save_bundle", "KernelSpec", "MissingKernelError", "convert"}:
            continue
        documented = getattr(na_compiler, name)
        assert any(test.examples for test in finder.find(documented)), f"{name} has no example"
