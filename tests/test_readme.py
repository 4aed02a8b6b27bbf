"""The Python of the README runs, and its flow trains every one of its parameters."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def section(title: str) -> dict[str, Any]:
    """Runs the first Python block below a heading; returns its names."""
    import dgm_kernels

    block = re.search(rf"^#+ {title}$.*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None, f"no Python below {title!r}"
    names: dict[str, Any] = {"torch": torch, "dgm": dgm_kernels}
    exec(compile(block[1], f"README: {title}", "exec"), names)
    return names


def test_first_example():
    x = section("dgm-kernels")["x"]
    assert x.shape == (64, 3, 64, 64) and x.isfinite().all()


def test_flows():
    names = section("Flows")
    assert names["loss"].isfinite()
    parameters = list(names["flow"].parameters())
    assert len(parameters) == 32
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)


def test_autoregressive_models():
    names = section("Autoregressive models")
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names["network"].parameters())
    assert names["images"].shape == (8, 1, 28, 28)
    assert torch.equal(names["images"][:, :, :14], names["levels"][:, None, :14])


def test_attention():
    names = section("Attention")
    assert names["along"].isfinite().all() and names["along"].abs().sum() > 0
    assert names["cache"].length == 16 and names["out"].shape == (4, 8, 1, 64)
    import dgm_kernels

    picture = dgm_kernels.masks.raster_2d(3, 3, 1).show()
    assert f">>> print(dgm.masks.raster_2d(3, 3, 1).show())\n{picture}\n```" in README


def test_latent_variables_and_mixtures():
    names = section("Latent variables and mixtures")
    assert names["mu"].grad.abs().sum() > 0 and names["log_var"].grad.abs().sum() > 0
    assert names["bound"].shape == (256,) and names["bound"].isfinite().all()
    x = names["x"]
    alone = torch.distributions.MultivariateNormal(torch.zeros(16), torch.eye(16)).log_prob(x).mean()
    assert names["log_prob"].mean() > alone  # eight fitted components explain the points better than the truth
    assert names["clean"].shape == (64, 16) and names["clean"].isfinite().all()


def test_every_block_is_python():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        if not block.startswith(">>>"):
            compile(block, "README", "exec")


def test_functions_of_the_table_exist():
    import dgm_kernels

    table = README[README.index("## What is in it") : README.index("**The same seed")]
    names = [name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([\w.]+)", row)]
    assert len(names) > 15
    for name in names:
        value: Any = dgm_kernels
        for part in name.split("."):
            if not hasattr(value, part):
                pytest.fail(f"README names {name}, which dgm_kernels does not have")
            value = getattr(value, part)
