import mmap

import numpy as np
import psutil
import pytest
import torch

from dlm_dist.training.memory import memory_figures, memory_in_use

CPU = torch.device("cpu")


def test_the_resident_set_grows_with_what_is_written_to():
    before = memory_in_use(CPU)
    # Memory of its own: an allocator may hand out again what was there before.
    held = mmap.mmap(-1, 64 << 20)
    np.frombuffer(held, dtype=np.uint8)[:] = 1
    (after,) = memory_in_use(CPU)
    assert after - before[0] >= len(held) // 2
    assert after <= psutil.virtual_memory().total


def test_what_a_device_does_not_have_is_null():
    assert memory_figures([5]) == {
        "resident_set_bytes": 5,
        "cuda_allocated_peak_bytes": None,
        "cuda_reserved_peak_bytes": None,
    }
    assert list(memory_figures([5, 6, 7]).values()) == [5, 6, 7]


@pytest.mark.gpu
def test_on_cuda_the_peak_is_that_since_the_last_call():
    device = torch.device("cuda")
    memory_in_use(device)
    held = torch.ones(1 << 20, device=device)
    del held
    _, allocated, reserved = memory_in_use(device)
    assert reserved >= allocated >= 4 << 20
    assert memory_in_use(device)[1] <= allocated - (4 << 20)
