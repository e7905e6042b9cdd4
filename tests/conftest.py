"""Triton's kernels run in its interpreter where there is no GPU; triton asks for it when it is imported. Token rows
that tests make go to a folder of their own, not into the user's cache."""

import os

# One of several worker processes (-n 2) has one thread, and so have the programs that it starts: two processes
# with two threads each would wait for each other. Read when torch is loaded, hence before it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from support.runs import job  # noqa: F401 (a fixture of two files; after the line above, since it imports triton)


@pytest.fixture(autouse=True, scope="session")
def rows_elsewhere(tmp_path_factory):
    from dataset import token_cache as rows

    folder = tmp_path_factory.mktemp("rows")
    rows.cache_folder = lambda: folder


@pytest.fixture(autouse=True, scope="module")
def short_sample_answers(request):
    """The answers on report.html take longer than the rest of a small run; test_report alone looks at them."""
    from training import run_report

    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("test_report"):
            patch.setattr(run_report, "MOST_ANSWER_TOKENS", 1)
        yield
