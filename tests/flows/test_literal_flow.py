"""The flow computes the same as a direct implementation of the equations."""

import pytest
import torch

from flowaug import create_flow
from tests import literal_flow


@pytest.mark.parametrize("coupling", ["affine", "matrix_exp"])
def test_flow_equals_the_literal_flow(coupling):
    flow = create_flow("mef_tiny", event_shape=(3, 8, 8), num_classes=2, steps=2, hidden=8, coupling=coupling).double()
    generator = torch.Generator().manual_seed(0)
    for p in flow.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        z, ladj = flow.encode(x)
        expected, expected_ladj = literal_flow.encode(flow, x)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(ladj, expected_ladj, rtol=0, atol=1e-9)
        torch.testing.assert_close(literal_flow.decode(flow, z), x, rtol=0, atol=1e-10)
