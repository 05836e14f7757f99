"""Settings of all tests: one thread a process (they run in parallel), fixed seeds, hypothesis without deadline."""

import pytest
import torch
from hypothesis import HealthCheck, settings

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
