"""Models from a user's own function: networks of plain torch, cut where that is proven to be safe."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.errors import InputError, UsageError
from edgepress.models import checkpoint, sources, surgery
from edgepress.models.inspect import inspect
from edgepress.plan import PruningPlan, Unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NETS = '''
import torch
from torch import nn

torch.manual_seed(0)
IMAGE = torch.randn(1, 3, 16, 16)
TOKENS = torch.randint(0, 50, (1, 9))


def conv(i, o, k=3, s=1, g=1):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.a, self.b = conv(i, o, 3, s), conv(o, o)
        self.skip = conv(i, o, 1, s) if (i, s) != (o, 1) else nn.Identity()

    def forward(self, x):
        return torch.relu(self.skip(x) + self.b(torch.relu(self.a(x))))


def resnet():
    body = [conv(3, 8), nn.ReLU(), Residual(8, 8, 1), Residual(8, 12, 2), Residual(12, 12, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)), IMAGE


class Inverted(nn.Module):
    def __init__(self, i, o, t, s):
        super().__init__()
        self.layers = nn.Sequential(
            conv(i, i * t, 1), nn.ReLU6(), conv(i * t, i * t, 3, s, i * t), nn.ReLU6(), conv(i * t, o, 1)
        )
        self.same = (i, s) == (o, 1)

    def forward(self, x):
        return x + self.layers(x) if self.same else self.layers(x)


def mobilenet():
    body = [conv(3, 6), nn.ReLU6(), Inverted(6, 6, 2, 1), Inverted(6, 10, 3, 2), conv(10, 16, 1), nn.ReLU6()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 5)]
    return nn.Sequential(*body, *head), IMAGE


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, image):
        x = torch.cat([torch.relu(self.a(image)), torch.relu(self.b(image))], dim=1)
        return self.head(self.c(x).mean(dim=(2, 3)))


def concatenated():
    return Concatenated(), {"image": IMAGE}


class Stubborn(nn.Module):
    """Its forward asks for the widths it was written with, and one norm sees all channels at once."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.c(self.norm(self.b(torch.relu(self.a(x)).reshape(-1, 6))))


def stubborn():
    return Stubborn(), torch.linspace(-1, 1, 4)[None]


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.c, self.d = nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 4, 1)

    def forward(self, image):
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(image)))))).mean(dim=(2, 3), keepdim=True))


def grouped():
    return Grouped(), IMAGE


class Encoder(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=not norm_first, norm_first=norm_first)
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        first = self.encoder.layers[0].self_attn.batch_first
        x = self.encoder(x if first else x.transpose(0, 1))
        return self.head(x.mean(dim=1 if first else 0))


def encoder():
    return Encoder(False), TOKENS


def encoder_prenorm():
    return Encoder(True), TOKENS


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(50, 8), kind(8, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.rnn(self.embedding(tokens))[0][:, -1])))


def lstm():
    return Recurrent(nn.LSTM), TOKENS


def gru():
    return Recurrent(nn.GRU), TOKENS


def fails():
    raise RuntimeError("no weights here")


def forgets_the_example():
    return nn.Linear(2, 2)


def poisoned():
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    return model, torch.ones(1, 2)


constant = 3
'''
NAMES = ("resnet", "mobilenet", "concatenated", "grouped", "stubborn", "encoder", "encoder_prenorm", "lstm", "gru")
SETTINGS = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder with the user's module, on the path as the working folder is for the command line."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "nets_of_a_user.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", params=NAMES)
def net(request: pytest.FixtureRequest, nets: Path) -> Any:
    """Each network as a workload, in float64 and with statistics of its norms that are not the initial ones."""
    workload = ep.load(f"nets_of_a_user:{request.param}")
    module = copy.deepcopy(workload.module).double()
    for name, values in module.named_buffers():
        if "running" in name:
            values.uniform_(0.5, 1.5)
    example = {k: v.double() if v.is_floating_point() else v for k, v in workload.example.items()}
    from dataclasses import replace

    return replace(workload, module=module, example=example)


@SETTINGS
@given(st.data())
def test_masked_is_removed(net: Any, plans: Any, data: st.DataObject) -> None:
    plan = data.draw(plans(net.structure))
    with torch.no_grad(), surgery.masked(net.module, net.structure, plan):
        masked = net.forward(net.example)
    pruned = surgery.prune(net, plan)
    with torch.no_grad():
        torch.testing.assert_close(masked, pruned.forward(net.example), rtol=0, atol=1e-9)
    again = surgery.prune(pruned, data.draw(plans(pruned.structure)))
    at_once = surgery.prune(net, again.plan)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), at_once.module.parameters(), strict=True))


def test_costs(net: Any) -> None:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):  # the one kernel whose products are counted
        net.module(**net.example)
    if net.name not in {"lstm", "gru"}:  # torch does not count recurrent layers
        assert net.macs == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)
    for site in net.structure.sites:
        pruned = surgery.prune(net, PruningPlan.of(site.units[:1]))
        assert net.params - pruned.params == site.params
        assert net.macs - pruned.macs == site.macs


FOUND = {
    "resnet": {"channel": 5},
    "mobilenet": {"channel": 6},
    "concatenated": {"channel": 3},
    "grouped": {"channel": 0},
    "stubborn": {"channel": 0},
    "encoder": {"head": 3, "ffn": 3, "block": 3},
    "encoder_prenorm": {"head": 3, "ffn": 3, "block": 3},
    "lstm": {"channel": 1},
    "gru": {"channel": 1},
}


def test_what_is_found_and_what_is_left_alone(net: Any) -> None:
    assert {kind: len(net.structure.of_kind(kind)) for kind in FOUND[net.name]} == FOUND[net.name]
    notes = " | ".join(net.structure.notes)
    if net.name == "stubborn":
        assert "a makes are left alone: without one of them the model fails" in notes
        assert "b makes are left alone: " in notes
    if net.name == "grouped":
        assert "b is a Conv2d of a kind that is not cut" in notes
        assert "c is a ConvTranspose2d of a kind that is not cut" in notes
    if net.name in {"lstm", "gru"}:
        assert "rnn is recurrent: its state is left alone" in notes
    assert inspect(net)["notes"] == list(net.structure.notes)


FRESH = """
import sys, torch
import edgepress as ep
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    workload = ep.load(f"nets_of_a_user:{name}@{folder}")
    with torch.no_grad():
        torch.save(workload.forward(workload.example), folder + ".outputs")
"""


def test_checkpoints_come_back_bit_for_bit(nets: Path, tmp_path: Path) -> None:
    saved = {}
    for name in NAMES:
        workload = ep.load(f"nets_of_a_user:{name}")
        units = [unit for site in workload.structure.sites if site.kind != "block" for unit in site.units[1:2]]
        pruned = surgery.prune(workload, PruningPlan.of(units))
        loss = pruned.forward(pruned.example).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in pruned.module.parameters():
                parameter -= 1e-3 * (parameter.grad if parameter.grad is not None else 0)  # noqa: PLW2901
        saved[name] = (pruned, checkpoint.save(pruned, tmp_path / name))
    args = [str(part) for name, (_, folder) in saved.items() for part in (name, folder)]
    subprocess.run([sys.executable, "-c", FRESH, *args], check=True, cwd=nets)
    for name, (pruned, folder) in saved.items():
        with torch.no_grad():
            assert torch.equal(torch.load(f"{folder}.outputs", weights_only=True), pruned.forward(pruned.example)), name


def test_a_checkpoint_cannot_make_a_function_run(nets: Path, tmp_path: Path) -> None:
    folder = checkpoint.save(ep.load("nets_of_a_user:resnet"), tmp_path / "resnet")
    with pytest.raises(InputError, match="nets_of_a_user:resnet@"):
        ep.load(str(folder))
    with pytest.raises(InputError, match="nets_of_a_user:resnet@"):
        ep.load(f"nets_of_a_user:gru@{folder}")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nets_of_a_user:nothing", UsageError, "no function 'nets_of_a_user:nothing'"),
        ("no_such_package.nets:resnet", UsageError, "No module named"),
        ("nets_of_a_user:constant", UsageError, "is not a function"),
        ("nets_of_a_user:fails", InputError, "RuntimeError: no weights here"),
        ("nets_of_a_user:forgets_the_example", InputError, r"must return \(module, one row of its inputs\)"),
        ("nets_of_a_user:poisoned", InputError, "NaN or infinite"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence(nets: Path, name: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ep.load(name)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("def net(:", InputError, "module_of_a_user, of 'module_of_a_user:net', cannot be imported: SyntaxError: "),
        ("net = undefined", InputError, "cannot be imported: NameError: name 'undefined'"),
        ("import torch\ntorch.no_such_thing", InputError, "cannot be imported: AttributeError: "),
        ("import no_such_package", InputError, "cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("raise SystemExit(0)", InputError, "cannot be imported: SystemExit: 0"),
        ("", UsageError, "no function 'module_of_a_user:net': module_of_a_user has no 'net'"),
    ],
)
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: Any, content: str, error: Any, message: str
) -> None:
    (tmp_path / "module_of_a_user.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for use in (ep.load, workload.judged_by, lambda name: sources.read(name, {})):
        sys.modules.pop("module_of_a_user", None)
        importlib.invalidate_caches()
        with pytest.raises(error, match=message) as caught:
            use("module_of_a_user:net")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_16_bits_become_32_and_64_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / f"net_in_{kind}.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n"
        "    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))\n"
        f"    return body.to(torch.{kind}), torch.randn(1, 3, 8, 8, dtype=torch.{kind})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = ep.load(f"net_in_{kind}:net")
    wanted = torch.float64 if kind == "float64" else torch.float32
    tensors = [*found.module.parameters(), *found.module.buffers(), *found.example.values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {wanted}
    pruned = surgery.prune(found, PruningPlan.of([Unit("channel", 0, 1)]))
    again = checkpoint.read(checkpoint.save(pruned, tmp_path / "out"), pruned.data, f"net_in_{kind}:net")
    assert torch.equal(again.forward(found.example), pruned.forward(found.example))
    assert inspect(pruned, rows=0)["params"] < inspect(found, rows=0)["params"]


def test_from_the_command_line(nets: Path, edgepress: Any, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    command = ("prune", "nets_of_a_user:resnet", "--method", "magnitude", "--recover", "none", "-o", out)
    done = edgepress(*command, cwd=nets)
    assert done.returncode == 0, done.stderr
    seen = edgepress("inspect", f"nets_of_a_user:resnet@{out}", "--json", cwd=nets)
    assert seen.returncode == 0, seen.stderr
    assert {entry["kind"] for entry in json.loads(seen.stdout)["layers"]} == {"channel"}
    table = edgepress("inspect", "nets_of_a_user:resnet", cwd=nets)
    assert "channel" in table.stdout
    assert "left alone" in table.stdout
    refused = edgepress(*command, "--uniform", cwd=nets)
    assert refused.returncode == 2
    assert "made by a function" in refused.stderr
