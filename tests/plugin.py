"""Settings of every pytest process. They come before the first import of torch, which tests/helpers.py does."""
import gc
import os
import sys


def pytest_configure(config):
    """Hide the GPU but from `python -m pytest -m gpu`: on a CPU results are exact. Then load the shared fixtures."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # the OpenMP threads of two workers must not spin against each other
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("OPENAI_API_KEY", None)
    os.chdir(config.rootpath)  # defaults like tiny/sd3 are relative to the repository
    sys.path[:0] = [str(config.rootpath), str(config.rootpath / "tiny")]
    if not config.getoption("numprocesses", None):  # with -n, only the workers run tests
        config.pluginmanager.import_plugin("tests.helpers")


def pytest_collection_finish(session):
    """Keep the garbage collector from looking through everything that has been imported, and let it look less often."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
