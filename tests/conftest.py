import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests that need it: two logical CPUs, whatever the machine has."""
    import ray

    from helpers import device

    # Workers import the functions of test modules by name.
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    device.start_ray(num_cpus=2)
    yield ray
    ray.shutdown()
