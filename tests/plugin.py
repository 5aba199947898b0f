"""Tests run on the CPU, where results are exact, but those of `python -m pytest -m gpu`."""
import os


def pytest_configure(config):
    """Before anything imports torch."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
