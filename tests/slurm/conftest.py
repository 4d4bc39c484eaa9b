import pytest

from tests.distributed import runs
from tests.slurm import cluster as slurm


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cluster():
    reason = slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm.local_cluster() as running:
        yield running
