import pytest


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests that need it: two logical CPUs, whatever the machine has."""
    import ray

    from helpers import device

    device.start_ray(num_cpus=2)
    yield ray
    ray.shutdown()
