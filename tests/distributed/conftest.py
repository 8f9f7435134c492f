import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """ranks(n): n running gloo processes, the same ones for every test; new ones after a failure."""
    running: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in running or not running[world].alive:
            running[world] = Ranks(world, tmp_path_factory.mktemp("ranks"))
        return running[world]

    yield get
    for group in running.values():
        group.stop()
