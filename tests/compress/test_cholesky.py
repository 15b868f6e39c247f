"""Second moments are made invertible, factored and inverted in their own memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from edgepress.compress.cholesky import RIDGE, damp_, factor_, inverse_
from edgepress.compress.score.readers import Moments


def test_inputs_that_vary_in_few_directions_are_damped_until_they_can_be_inverted() -> None:
    x = torch.outer(torch.linspace(1, 2, 500), torch.linspace(-3, 3, 64))
    moments = Moments.nothing(64, x, gram=True)
    moments.add(x)
    moments.gram -= 1e-2 * torch.eye(64)  # as rounding may leave it
    assert torch.linalg.eigvalsh(damp_(moments.covariance(centred=True))).min() > 0
    exact = damp_(replace(moments, gram=torch.eye(64)).covariance(centred=False))
    torch.testing.assert_close(exact, (1 + RIDGE) * torch.eye(64, dtype=torch.float64))


def test_a_factor_and_an_inverse_take_the_place_of_the_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 40, dtype=torch.float64)
    h = x.T @ x
    for make, wanted in ((factor_, torch.linalg.cholesky(h)), (inverse_, torch.linalg.inv(h))):
        own = h.clone()
        found = make(own)
        assert found.data_ptr() == own.data_ptr()
        torch.testing.assert_close(found, wanted)
