"""What all ops promise on a CUDA device: they follow their tensors' device, and never wait for it."""

import pytest
import torch

import dgm_kernels as dgm
from bench.small_calls import CALLS
from tests.contract import assert_never_waits, record_native_calls

pytestmark = pytest.mark.gpu
every_op = pytest.mark.parametrize("op", CALLS)


def check_native_calls(op: str, device: torch.device, backends: set[str]) -> None:
    """The op's kernels of these backends run, and give tensors on the device of their operands, each element written.

    Recorded on its own: while ops are recorded, nothing that a call makes is kept for the next one.
    """
    with record_native_calls() as calls:
        CALLS[op](device)
    assert calls, "no native kernel has run"
    found = {backend for backend, _ in calls}
    assert found <= backends, f"{sorted(found)} have run"
    results = [tensor for _, tensors in calls for tensor in tensors]
    assert {tensor.device for tensor in results} == {device}
    assert any(tensor.numel() for tensor in results)
    # Memory that no kernel has written to is NaN in a test.
    assert not any(tensor.isnan().any() for tensor in results)


@every_op
def test_never_waits_for_the_device(op):
    device = torch.device("cuda", torch.cuda.current_device())
    CALLS[op](device)  # Triton compiles, tables and masks are brought to the device
    torch.cuda.synchronize()
    with assert_never_waits():  # which fails where a wait would go unnoticed
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        CALLS[op](device)
        after = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    assert after > before, "the call has made no tensor on the device"
    check_native_calls(op, device, {"cuda", "triton"})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_op
def test_runs_on_the_device_of_its_tensors(op):
    device = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    CALLS[op](device)
    torch.cuda.synchronize(device)
    assert torch.cuda.max_memory_allocated(device) > before, "the call has taken no memory of its device"
    check_native_calls(op, device, {"cuda", "triton"})
    assert torch.cuda.current_device() == 0


@every_op
def test_has_a_kernel_there(op):
    """Forced to Triton, no call falls back to the reference: it would raise."""
    device = torch.device("cuda", torch.cuda.current_device())
    with dgm.use_backend("triton"):
        CALLS[op](device)
        check_native_calls(op, device, {"triton"})
    torch.cuda.synchronize()
