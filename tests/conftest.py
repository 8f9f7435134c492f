import itertools
import logging
import os
import shutil
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports transformers: no test looks for a network
if not shutil.which("nvidia-smi"):
    # Triton kernels are interpreted. Its own functions are too, as chosen when triton is imported, by whichever library: so it is
    # said here, before any test is collected, and the kernels' tests run in the ordinary test processes.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def s3_server():
    """A server on this machine that speaks S3. `stop()` and `start()` keep what it holds."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._port = server.get_host_and_port()[1]  # of the next start too

    def stop() -> None:
        server.stop()
        server._server.server_close()  # refuses from now on

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server._port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "known-to-all")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-seen")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the driver, for each of ours
        yield SimpleNamespace(start=server.start, stop=stop)
    stop()


_numbers = itertools.count()


@pytest.fixture
def bucket(s3_server) -> str:
    """The URL of an empty bucket."""
    import fsspec

    name = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
