"""The example of README.md runs, and does what it says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def block(marker):
    """Return the fenced block that follows a marker."""
    found = re.search(
        rf"^<!-- {marker} -->\n+```\w*\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"README.md has no block after <!-- {marker} -->"
    return found[1]


@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_example():
    code = block("example")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(code, str(README), "exec"), names)
    explicit, ifvp, gradients = (names[name] for name in ("explicit", "ifvp", "test_gradients"))
    assert [u.shape for u in ifvp] == [g.shape for g in gradients]
    u = torch.cat([piece.flatten() for piece in ifvp]).double()
    v = torch.cat([piece.flatten() for piece in gradients]).double()
    residual = explicit.fisher_.to_dense() @ u + 1e-3 * u - v
    assert float(residual.norm() / v.norm()) < 1e-4
    assert float((u - v).norm() / v.norm()) > 1
