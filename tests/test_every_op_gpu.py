"""What all ops promise on a CUDA device: they follow their tensors' device, and never wait for it."""

import pytest
import torch

import dgm_kernels as dgm
from bench.small_calls import CALLS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", CALLS)
def test_never_waits_for_the_device(op):
    device = torch.device("cuda")
    CALLS[op](device)  # Triton compiles, tables and masks are brought to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[op](device)  # raises where something waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_device_of_its_tensors(op):
    assert torch.cuda.current_device() == 0
    CALLS[op](torch.device("cuda", 1))
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", CALLS)
def test_has_a_kernel_there(op):
    """Forced to Triton, no call falls back to the reference: it would raise."""
    with dgm.use_backend("triton"):
        CALLS[op](torch.device("cuda"))
    torch.cuda.synchronize()
