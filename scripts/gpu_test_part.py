"""A pytest plugin for gpu_check.sh: of the tests that were selected, every n-th from the i-th on.

``TEST_PART=i/n`` says which.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    part, parts = map(int, os.environ["TEST_PART"].split("/"))
    items[:] = items[part::parts]
