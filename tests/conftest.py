"""What every test gets: fixed seeds, one thread per xdist worker, and the place of the real data."""

from __future__ import annotations

import pathlib

import pytest
import torch

DEFAULT_DATA = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        metavar="PATH",
        default=str(DEFAULT_DATA),
        help="folder of the real data sets that slow tests use",
    )
    parser.addoption(
        "--fuzz",
        metavar="N",
        type=int,
        default=100_000,
        help="random cases of tests/test_fuzz.py, all operators together",
    )


@pytest.fixture(scope="session")
def data_root(request: pytest.FixtureRequest) -> pathlib.Path:
    """Folder of the real data sets; the test is skipped where there is none."""
    root = pathlib.Path(request.config.getoption("--data")).expanduser()
    if not root.is_dir():
        pytest.skip(f"no data folder {root}: say where it is with --data PATH")
    return root


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if hasattr(request.config, "workerinput"):  # under xdist: the workers share the cores
        torch.set_num_threads(1)
