"""Skips these tests where vLLM is not installed; `make test-vllm` fails there."""

import importlib.util

import pytest

from tests.vllm.runs import use_one_engine


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if "tests/vllm/" in item.path.as_posix():
            item.add_marker(pytest.mark.vllm)
            if missing:
                item.add_marker(pytest.mark.skip(reason="vllm is not installed: run `make test-vllm`"))


@pytest.fixture(autouse=True)
def one_engine(request, monkeypatch):
    use_one_engine(monkeypatch)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The folder that vLLM reads the model from."""
    return tmp_path_factory.mktemp("model")
