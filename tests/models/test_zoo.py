"""The embedded default is real, fixed and documented."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from edgepress.errors import InputError, UnavailableError
from edgepress.models.metrics import of_session
from edgepress.models.zoo import fetch


def test_splits_are_as_documented(minilm: Any) -> None:
    data = minilm.data
    assert (len(data.evaluation), len(data.calibration)) == (3000, 512)
    assert len(data.train) > 9000
    data.check_disjoint()
    assert abs(float(np.mean(data.evaluation.labels)) - 0.5) < 0.01


@pytest.mark.slow
def test_the_head_has_learned(minilm: Any) -> None:
    import torch

    def run(feeds: Any) -> Any:
        with torch.inference_mode():
            return [minilm.forward({name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()]

    quality = of_session(run, minilm)
    assert quality.low > 70


def test_a_package_that_differs_from_its_pin_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="sha256"):
        fetch.fetch(fetch.Package("iniconfig", "2.0.0", "0" * 64, ("iniconfig/__init__.py",)))
    with pytest.raises(UnavailableError, match="could not download"):
        fetch.fetch(fetch.Package("edgepress-no-such-package", "1.0", "0" * 64, ()))
    assert not list(tmp_path.iterdir())


def test_loading_from_the_cache_needs_no_network(minilm: Any) -> None:
    code = "import edgepress as ep; print(ep.load('zoo:minilm-reviews').fingerprint())"
    blocked = {"PIP_NO_INDEX": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **blocked}
    )
    assert done.stdout.strip() == minilm.fingerprint()
