"""Movement along the ray: exact where it must be, in float32 at least, two copies at most."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opd_lightning.extrapolation import AnchoredWeights, extrapolate_product, select_parameters
from opd_lightning.extrapolation import weights as weights_module

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (7, 5), "vector": (11,), "scalar": (), "empty": (0, 3), "strided": (4, 6)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    made["strided"] = made["strided"].t()
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def nudge(parameters, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in parameters.values():
            weight += (size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def copies(parameters):
    return {name: weight.detach().clone() for name, weight in parameters.items()}


def bits(parameters):
    return {
        name: weight.detach().contiguous().view(-1).view(torch.uint8).tolist() for name, weight in parameters.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=20)
@given(factor=st.sampled_from([2.0, 4.0, 10.0, 0.5, 0.3, -0.25, -0.5, -0.9, -1.0]), seed=st.integers(0, 99))
def test_candidates_are_the_ray_in_float64(dtype, factor, seed):
    parameters = make_weights(seed, dtype)
    older = copies(parameters)
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    current = copies(parameters)
    anchored.begin()
    anchored.move_to(factor)
    for name, weight in parameters.items():
        exact = current[name].double() + factor * (current[name].double() - older[name].double())
        size = (1 + abs(factor)) * torch.maximum(current[name].double().abs(), older[name].double().abs())
        # float32 arithmetic and one rounding to the weight's own dtype, not a chain of roundings
        arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        tolerance = 4 * arithmetic * size + 0.5 * torch.finfo(dtype).eps * exact.abs() * 1.01
        if dtype == torch.float16:
            tolerance += 2.0**-25  # half of the smallest subnormal number
        assert ((weight.double() - exact).abs() <= tolerance).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_going_back_is_bit_identical(dtype):
    parameters = make_weights(dtype=dtype)
    with torch.no_grad():
        parameters["matrix"][0, 0], parameters["vector"][3] = math.inf, math.nan
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    before = bits(parameters)
    anchored.begin()
    for factor in (2.0, 10.0, -0.5):
        anchored.move_to(factor)
    anchored.move_to(0.0)
    assert bits(parameters) == before


def test_candidates_do_not_depend_on_those_before():
    parameters = make_weights()
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    anchored.begin()
    anchored.move_to(6.0)
    direct = copies(parameters)
    for factor in (2.0, 4.0, -0.5, 10.0, 6.0):
        anchored.move_to(factor)
    assert all(torch.equal(parameters[name], weight) for name, weight in direct.items())


def test_the_next_direction_starts_at_the_point_kept():
    parameters = make_weights(dtype=torch.float64)
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    anchored.begin()
    anchored.move_to(2.0)
    anchored.end(moved=True)
    assert anchored.measure()[0] == 0
    kept = copies(parameters)
    nudge(parameters, seed=2)
    anchored.begin()
    anchored.move_to(-1.0)
    for name, weight in parameters.items():
        torch.testing.assert_close(weight.detach(), kept[name], rtol=1e-14, atol=1e-15)


def test_a_failed_search_keeps_the_older_anchor():
    parameters = make_weights()
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    norm = anchored.measure()[0]
    anchored.begin()
    anchored.move_to(2.0)
    anchored.abort()
    assert anchored.measure()[0] == norm


def test_norm_and_cosine_are_those_of_the_flat_vectors():
    parameters = make_weights(dtype=torch.float64)
    points = [torch.cat([weight.detach().flatten() for weight in parameters.values()])]
    anchored = AnchoredWeights(parameters)
    deltas = []
    for seed in (1, 2, 3):
        nudge(parameters, seed=seed)
        points.append(torch.cat([weight.detach().flatten() for weight in parameters.values()]))
        deltas.append(points[-1] - points[-2])
        norm, cosine = anchored.measure()
        assert norm == pytest.approx(float(deltas[-1].norm()), rel=1e-12)
        if len(deltas) == 1:
            assert math.isnan(cosine)
        else:
            assert cosine == pytest.approx(float(torch.cosine_similarity(deltas[-1], deltas[-2], dim=0)), rel=1e-9)
        anchored.begin()
        anchored.end(moved=False)


def test_in_a_large_model_the_cosine_is_estimated_from_a_sample(monkeypatch):
    monkeypatch.setattr(weights_module, "_NUM_SAMPLED", 4096)
    generator = torch.Generator().manual_seed(0)
    parameters = {f"layer{i}": nn.Parameter(torch.randn(256, 192, generator=generator)) for i in range(3)}
    anchored = AnchoredWeights(parameters)
    common = {name: torch.randn(weight.shape, generator=generator) for name, weight in parameters.items()}
    columns = torch.linspace(0.1, 3, 192)  # a sample of a few columns would be far off
    deltas = []
    for _ in range(2):
        delta = {n: (c + torch.randn(c.shape, generator=generator) * columns) * columns for n, c in common.items()}
        with torch.no_grad():
            for name, weight in parameters.items():
                weight += delta[name]
        deltas.append(torch.cat([d.flatten() for d in delta.values()]))
        cosine = anchored.measure()[1]
        anchored.begin()
        anchored.end(moved=False)
    state = anchored.state_dict(gathered=False)
    assert sum(sample.numel() for sample in state["directions"][0].values()) <= 4096
    assert cosine == pytest.approx(float(torch.cosine_similarity(*deltas, dim=0)), abs=0.05)


def test_a_weight_without_entries_is_sampled_in_a_large_model_too(monkeypatch):
    monkeypatch.setattr(weights_module, "_NUM_SAMPLED", 2)
    parameters = {"matrix": nn.Parameter(torch.zeros(4, 3)), "shard": nn.Parameter(torch.zeros(0))}
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    assert anchored.measure()[0] > 0


class CountedTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is allocated, in entries of the weights' size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and "view" not in str(function) and "detach" not in str(function):
                self.largest = max(getattr(self, "largest", 0), tensor.numel())
                self.functions = [*getattr(self, "functions", []), str(function)]
        return result


def test_one_copy_at_rest_two_in_a_search_and_none_per_candidate():
    parameters = {"weight": nn.Parameter(torch.randn(1000))}
    anchored = AnchoredWeights(parameters)
    nudge(parameters)
    at_rest = anchored._anchors["weight"]
    anchored.begin()
    with CountedTensors() as counted:
        anchored.move_to(2.0)
        anchored.move_to(4.0)
        anchored.move_to(0.0)
    assert set(counted.functions) == {"aten.lerp.Scalar_out", "aten.copy_.default"}
    searched_from = anchored._saved["weight"]
    anchored.end(moved=False)
    assert anchored._anchors["weight"] is searched_from
    assert anchored._anchors["weight"] is not at_rest
    assert not anchored._saved


def test_low_rank_pairs_take_the_step_of_their_product():
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (9, 2), "bias": (9,)}
    for lora in ("product", "factors"):
        parameters = {name: nn.Parameter(torch.randn(shape).double()) for name, shape in shapes.items()}
        older = copies(parameters)
        anchored = AnchoredWeights(parameters, lora=lora)
        nudge(parameters)
        current = copies(parameters)
        anchored.begin()
        anchored.move_to(4.0)
        linear = {name: current[name] + 4 * (current[name] - older[name]) for name in shapes}
        points = [point[name] for point in (current, older) for name in ("lora_A.weight", "lora_B.weight")]
        if lora == "product":
            linear["lora_A.weight"], linear["lora_B.weight"] = extrapolate_product(*points, 4.0)
        for name, weight in parameters.items():
            torch.testing.assert_close(weight.detach(), linear[name])
        anchored.move_to(0.0)
        assert all(torch.equal(parameters[name], current[name]) for name in shapes)


def test_the_anchor_can_live_on_another_device_than_the_weights():
    saved, anchor = torch.randn(50), torch.randn(50)
    beside, staged = torch.empty(50), torch.empty(50)
    weights_module._extrapolate(anchor, saved, 3.0, out=beside)
    staged.copy_(saved)
    torch.lerp(anchor, staged, 4.0, out=staged)  # what happens on the weight's device: the output is an input
    assert torch.equal(beside, staged)
    parameters = make_weights()
    assert all(
        anchor.device.type == "cpu" for anchor in AnchoredWeights(parameters, anchor_device="cpu")._anchors.values()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pinned_anchor_gives_the_same_bits(dtype):
    results = []
    for anchor_device in (None, "cpu"):
        parameters = {name: nn.Parameter(weight.detach().cuda()) for name, weight in make_weights(dtype=dtype).items()}
        anchored = AnchoredWeights(parameters, anchor_device=anchor_device)
        assert anchor_device is None or anchored._anchors["matrix"].is_pinned()
        nudge_on_device = {name: torch.full_like(weight, 0.1) for name, weight in parameters.items()}
        with torch.no_grad():
            for name, weight in parameters.items():
                weight += nudge_on_device[name]
        norm = anchored.measure()[0]
        anchored.begin()
        anchored.move_to(4.0)
        moved = copies(parameters)
        anchored.move_to(0.0)
        anchored.end(moved=False)
        results.append((norm, moved, copies(parameters)))
    assert results[0][0] == pytest.approx(results[1][0])
    for name in parameters:
        assert torch.equal(results[0][1][name], results[1][1][name])
        assert torch.equal(results[0][2][name], results[1][2][name])


def test_an_enclosing_autocast_block_sees_the_moved_weights():
    layer = nn.Linear(4, 3)
    anchored = AnchoredWeights(dict(layer.named_parameters()))
    x = torch.ones(2, 4)
    with torch.no_grad():
        layer.weight += 1
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        anchored.begin()
        anchored.move_to(2.0)
        inside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, layer(x))
    assert not torch.equal(before, inside)


def test_state_of_other_weights_is_refused():
    anchored = AnchoredWeights({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(3))})
    state = anchored.state_dict(gathered=True)
    with pytest.raises(ValueError, match=r"other weights than those chosen now.*saved \['a', 'b'\], current \['c'\]"):
        AnchoredWeights({"c": nn.Parameter(torch.zeros(2))}).load_state_dict(state)
    reshaped = AnchoredWeights({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(4))})
    with pytest.raises(ValueError, match=r"saved \['b'\], current \[\]"):
        reshaped.load_state_dict(state)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_selection_takes_trainable_weights_once():
    module = Tied()
    everything = list(module.named_parameters(remove_duplicate=False))
    assert list(select_parameters(everything, None)) == ["embed.weight", "head.bias"]
    assert list(select_parameters(everything, r"\.bias$")) == ["head.bias"]
    assert list(select_parameters(everything, lambda name: "embed" in name)) == ["embed.weight"]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        ("attention", r"'attention' matches none of the 2 trainable weights. Their names are: embed.weight, head.bias"),
        (lambda name: False, r"matches none of the 2 trainable weights"),
        ("frozen", r"'frozen' matches none"),
        ("(", r"parameters: '\(' is not a regular expression"),
    ],
)
def test_selection_that_leaves_nothing_is_refused(choose, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(Tied().named_parameters(), choose)


def test_a_frozen_module_is_refused():
    with pytest.raises(ValueError, match="no trainable weight"):
        select_parameters(Tied().requires_grad_(False).named_parameters(), None)
