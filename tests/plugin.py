"""Tests run on the CPU, where results are exact, but those of `python -m pytest -m gpu`."""
import gc
import os


def pytest_configure(config):
    """Before anything imports torch. OpenMP's threads of two workers must not spin against each other."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session):
    """What has been imported stays: the garbage collector need not look through it again."""
    gc.freeze()
