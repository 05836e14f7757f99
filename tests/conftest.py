"""Settings of all tests: one thread a process (they run in parallel), fixed seeds, hypothesis without deadline.

What is predicted rests on the constants that are shipped, whatever was measured on the machine that runs the tests.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tensorlayers.machine import SHIPPED, VARIABLE
from tests.embedding import settings_of_the_lookup

os.environ[VARIABLE] = str(SHIPPED)
torch.set_num_threads(1)

settings.register_profile(
    "tensorlayers",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("tensorlayers")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["", "sharing"])
def sorting(request):
    with settings_of_the_lookup(sharing=request.param):
        yield
