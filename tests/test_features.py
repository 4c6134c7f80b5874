"""h(x), z(x) and e(x) of many kinds of models, and that a model is left as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import (
    MLP,
    Block,
    ResidualNet,
    Wrapped,
    assert_same_snapshot,
    batches,
    cnn,
    left_alone,
    patterns,
    snapshot,
    taught_cnn,
    taught_mlp,
    teach,
)
from torch_grood import GROOD, FeatureExtractor, Mixup, PrototypeMean, UniformNoise
from torch_grood.errors import GroodError
from torch_grood.features import model_fingerprint


def images(n: int = 5, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def table(n: int = 5) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(model: nn.Module, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of one module in eval mode, copied at the moment that it runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    modes = [m.training for m in model.modules()]
    model.eval()
    first: list[Tensor] = []
    before = module.register_forward_pre_hook(lambda _, args: first.append(args[0].clone()))
    after = module.register_forward_hook(lambda _, __, output: seen.append((first[-1], output.clone())))
    model(inputs)
    before.remove()
    after.remove()
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    return seen[-1]


def resolved(model: nn.Module, inputs: Tensor, **names: str) -> FeatureExtractor:
    extractor = FeatureExtractor(model, **names)
    extractor.resolve(inputs, early=True)
    return extractor


def assert_cut(extractor: FeatureExtractor, inputs: Tensor) -> None:
    """Replacing e(x) by itself changes no bit; replacing it by another sample's gives that sample's features."""
    plain = extractor(inputs)
    same = extractor(inputs, lambda early: early)
    copied = extractor(inputs, lambda early: early.clone())
    assert torch.equal(same.features, plain.features)
    assert torch.equal(same.logits, plain.logits)
    assert torch.equal(copied.features, plain.features)
    assert torch.equal(copied.logits, plain.logits)
    rolled = extractor(inputs, lambda early: early.roll(1, 0))
    tolerance = 2e-2 if plain.features.dtype in (torch.float16, torch.bfloat16) else 1e-4
    torch.testing.assert_close(
        rolled.features.double(), plain.features.roll(1, 0).double(), rtol=tolerance, atol=tolerance
    )
    assert not torch.allclose(plain.features[0].double(), plain.features[1].double()), "the samples must differ"


# --- Head and early layer are found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "inputs", "head", "early", "d"),
    [
        (MLP, table(), "out", "first", 12),
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), table(), "2", "1", 9),
        (cnn, images(), "8", "1", 32),
        (lambda: cnn(inplace=True), images(), "8", "1", 32),
        (lambda: cnn(channels=1), images(channels=1), "8", "1", 32),
        (ResidualNet, images(), "fc", "layer1", 8),
    ],
    ids=["mlp", "sequential-mlp", "cnn", "cnn-inplace", "grey-cnn", "residual"],
)
def test_finds_head_and_early_layer(
    make: Callable[[], nn.Module], inputs: Tensor, head: str, early: str, d: int
) -> None:
    torch.manual_seed(0)
    model = make()
    extractor = resolved(model, inputs)
    assert (extractor.head, extractor.early_layer) == (head, early)
    found = extractor(inputs)
    feature, logits = by_hand(model, model.get_submodule(head), inputs)
    assert found.features.shape == (len(inputs), d)
    assert torch.equal(found.features, feature)
    assert torch.equal(found.logits, logits)
    assert_cut(extractor, inputs)


def test_early_activation_is_read_before_an_inplace_relu_overwrites_it() -> None:
    torch.manual_seed(0)
    model = cnn(inplace=True)
    inputs = images()
    _, expected = by_hand(model, model[0], inputs)
    seen: list[Tensor] = []
    FeatureExtractor(model, early_layer="0")(inputs, lambda early: seen.append(early.clone()))
    assert (expected < 0).any()
    assert torch.equal(seen[-1], expected)


def test_mixing_before_an_inplace_relu_changes_the_result_as_by_hand() -> None:
    torch.manual_seed(0)
    model = cnn(inplace=True).eval()
    inputs, partner = images(), torch.randn(8, 8, 8)
    mixed = FeatureExtractor(model, early_layer="0")(inputs, lambda early: 0.3 * early + 0.7 * partner)
    with torch.no_grad():
        expected = model[1:8](0.3 * model[0](inputs) + 0.7 * partner)
    torch.testing.assert_close(mixed.features, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: z / 7.0,
        lambda z: (100 * z).softmax(1),
        lambda z: z.sigmoid(),
        lambda z: z - z.amax(1, keepdim=True),
    ],
    ids=["softmax", "log-softmax", "temperature", "saturated-softmax", "sigmoid", "shifted"],
)
def test_logits_are_the_heads_output_though_the_model_goes_on(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    body = cnn()
    model = Wrapped(body, change)
    extractor = resolved(model, images())
    assert extractor.head == "body.8"
    feature, logits = by_hand(model, body[8], images())
    found = extractor(images())
    assert torch.equal(found.features, feature)
    assert torch.equal(found.logits, logits)


class ModelOutput(dict[str, Any]):
    """Dict-like with attributes, as Hugging Face's."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    "change",
    [
        lambda z: {"logits": z},
        lambda z: {"loss": None, "logits": z, "hidden_states": (z, z)},
        lambda z: ModelOutput(logits=z),
        lambda z: SimpleNamespace(logits=z),
        lambda z: (z, torch.zeros(1)),
        lambda z: [z],
        lambda z: ({"logits": z}, None),
    ],
    ids=["dict", "full-dict", "model-output", "attribute", "tuple", "list", "nested"],
)
def test_outputs_that_are_not_a_tensor(change: Callable[[Tensor], Any]) -> None:
    model = Wrapped(cnn(), change)
    extractor = resolved(model, images())
    assert extractor.head == "body.8"
    assert extractor(images()).logits.shape == (5, 3)
    assert_cut(extractor, images())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: {"scores": z}, r"expected logits \(n, C\).*got .*; wrap the model"),
        (lambda z: None, "got NoneType; wrap the model"),
        (lambda z: z[:, :, None], r"got shape \(4, 3, 1\); wrap"),
        (lambda z: z[:, 0], r"got shape \(4,\); wrap"),
        (lambda z: z[:, :1], r"C ≥ 2 classes.*got shape \(4, 1\); wrap"),
        (lambda z: (), "got tuple; wrap the model"),
    ],
)
def test_outputs_that_are_no_logits(change: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(GroodError, match=said):
        resolved(Wrapped(cnn(), change), images())


class TwoHeads(nn.Module):
    """Main and auxiliary head on the same features; both run, the auxiliary one last or first."""

    def __init__(self, classes: int, aux_last: bool, output: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU())
        self.aux = nn.Linear(10, classes)
        self.main = nn.Linear(10, classes)
        self.aux_last, self.output = aux_last, output

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        if self.aux_last:
            main = self.main(h)
            return self.output(main, self.aux(h))
        aux = self.aux(h.detach())
        return self.output(self.main(h), aux)


@pytest.mark.parametrize("aux_last", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_auxiliary_head_is_never_taken(request: pytest.FixtureRequest, classes: int, aux_last: bool) -> None:
    wrong = []
    for seed in range(25):
        torch.manual_seed(seed)
        model = TwoHeads(classes, aux_last, lambda main, aux: (main, aux))
        extractor = FeatureExtractor(model)
        extractor.resolve(table(2))
        if extractor.head != "main":
            wrong.append(seed)
    assert not wrong, f"the head that the output equals is 'main'; another was taken for {len(wrong)} of 25 seeds"


def test_an_auxiliary_head_in_a_dict() -> None:
    torch.manual_seed(0)
    model = TwoHeads(7, False, lambda main, aux: {"aux": aux, "logits": main})
    assert resolved(model, table()).head == "main"


def test_an_ensemble_of_heads_is_an_error_with_the_remedy_and_works_when_named() -> None:
    torch.manual_seed(0)
    model = TwoHeads(5, True, lambda main, aux: main + aux)
    with pytest.raises(GroodError, match=r"found no linear layer.*body\.0, body\.2, aux, main.*Pass head='…'"):
        resolved(model, table())
    extractor = resolved(model, table(), head="main")
    feature, _ = by_hand(model, model.main, table())
    found = extractor(table())
    assert torch.equal(found.features, feature)
    with torch.no_grad():
        assert torch.equal(found.logits, model(table()))


class SharedHead(nn.Module):
    """One head, called on two features; the logits are those of the given call."""

    def __init__(self, of_call: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 10)
        self.head = nn.Linear(10, 4)
        self.of_call = of_call

    def forward(self, x: Tensor) -> Any:
        h1 = self.first(x).relu()
        h2 = self.second(h1).relu()
        outputs = self.head(h1), self.head(h2)
        return outputs[self.of_call], outputs[1 - self.of_call]


def test_shared_head_is_read_at_the_call_that_gives_the_logits() -> None:
    torch.manual_seed(0)
    model = SharedHead(1)
    found = resolved(model, table())(table())
    with torch.no_grad():
        assert torch.equal(found.features, model.second(model.first(table()).relu()).relu())
        assert torch.equal(found.logits, model(table())[0])


def test_shared_head_whose_first_call_gives_the_logits_is_no_silent_mistake() -> None:
    torch.manual_seed(0)
    with pytest.raises(GroodError, match="Pass head='…'"):
        resolved(SharedHead(0), table())


def test_two_linear_layers_of_the_same_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert resolved(model, table()).head == "4"
    softmax = nn.Sequential(*model, nn.Softmax(1))
    assert resolved(softmax, table()).head == "4"


class TokenHead(nn.Module):
    """Classifies every token, then averages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.mix = nn.Linear(10, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(self.embed(x.unflatten(0, (-1, 1)).expand(-1, 5, -1)).relu())
        return self.head(tokens * torch.arange(1.0, 6).view(1, 5, 1)).mean(1)


def test_named_head_on_tokens_gives_the_mean_token() -> None:
    torch.manual_seed(0)
    model = TokenHead()
    with pytest.raises(GroodError, match="Pass head='…'"):
        resolved(model, table())
    extractor = resolved(model, table(), head="head")
    found = extractor(table())
    assert found.features.shape == (5, 10)
    with torch.no_grad():
        torch.testing.assert_close(model.head(found.features), model(table()))
        assert torch.equal(found.logits, model(table()))
    assert_cut(extractor, table())


class MapHead(nn.Module):
    """A head on a feature map, then the mean over its positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.conv = nn.Conv2d(10, 10, 3, padding=1)
        self.kind = kind
        self.head: nn.Module = {
            "conv": nn.Conv2d(10, 4, 1),
            "conv1d": nn.Conv1d(10, 4, 1),
            "channels-last": nn.Linear(10, 4),
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.stem(x).relu()).relu()
        if self.kind == "conv":
            return self.head(h).mean((2, 3))
        if self.kind == "conv1d":
            return self.head(h.flatten(2)).mean(2)
        return self.head(h.movedim(1, -1)).mean((1, 2))


@pytest.mark.parametrize("kind", ["conv", "conv1d", "channels-last"])
def test_named_head_on_a_map_gives_the_mean_position(request: pytest.FixtureRequest, kind: str) -> None:
    torch.manual_seed(0)
    model = MapHead(kind)
    with pytest.raises(GroodError, match=r"found no linear layer of MapHead.*Pass head='…'.*last modules are .*head"):
        resolved(model, images())
    extractor = resolved(model, images(), head="head")
    found = extractor(images())
    with torch.no_grad():
        expected = model.conv(model.stem(images()).relu()).relu().mean((2, 3))
    assert found.features.shape == (5, 10)
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.logits, model(images()).detach())


def test_1x1_conv_head_after_pooling_works_when_named_end_to_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.Flatten()
    ).eval()
    inputs, _ = patterns(30)
    labels = model(inputs).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model, head="3").fit(batches(inputs, labels, 10))
    assert detector.class_prototypes_.shape == (3, 8)
    assert detector.fit_info_.head == "3"


def test_names_that_do_not_exist_list_the_modules() -> None:
    with pytest.raises(GroodError, match=r"head='classifier' is no module of MLP; its modules are first, second"):
        GROOD(MLP(), head="classifier")
    with pytest.raises(GroodError, match=r"early_layer='layer1' is no module of MLP.*first, second"):
        GROOD(MLP(), early_layer="layer1")


def test_a_head_that_never_runs() -> None:
    model = MLP()
    model.spare = nn.Linear(12, 3)
    with pytest.raises(GroodError, match="head 'spare' did not run"):
        FeatureExtractor(model, head="spare")(table())


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.norm2", "layer1.1.conv2", "layer1.0.relu"])
def test_an_early_layer_inside_a_residual_branch_is_an_error_with_the_remedy(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(GroodError, match=rf"early_layer='{name}' does not carry.*Layers that do: .*layer1"):
        resolved(ResidualNet(), images(), early_layer=name)


@pytest.mark.parametrize("name", ["stem", "layer1", "layer1.0", "layer2.0"])
def test_any_cut_may_be_named(name: str) -> None:
    torch.manual_seed(0)
    extractor = resolved(ResidualNet(), images(), early_layer=name)
    assert extractor.early_layer == name
    assert_cut(extractor, images())


@pytest.mark.parametrize("name", ["fc", "", "layer2.1.relu"])
def test_an_early_layer_that_cannot_be_one(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(GroodError, match="does not carry the whole sample"):
        resolved(ResidualNet(), images(), early_layer=name)


def test_a_named_layer_in_a_branch_is_refused_though_the_first_image_is_blank() -> None:
    torch.manual_seed(0)
    with pytest.raises(GroodError, match="does not carry the whole sample"):
        resolved(ResidualNet(), torch.cat([torch.zeros(1, 3, 8, 8), images()]), early_layer="layer1.0.conv1")


class LateCut(nn.Module):
    """Two residual steps; the one cut, `c`, is the third of four layers."""

    def __init__(self, columns: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(columns, columns), nn.Linear(columns, columns)
        self.c, self.d = nn.Linear(columns, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).tanh()
        x = x + self.b(x).tanh()
        return self.d(self.c(x).tanh())


def test_a_cut_may_lie_deep_if_it_is_named() -> None:
    torch.manual_seed(0)
    assert_cut(resolved(LateCut(), table(), early_layer="c"), table())


@pytest.mark.parametrize("named", [True, False])
def test_a_deep_cut_is_found_or_at_least_mentioned(named: bool) -> None:
    torch.manual_seed(0)
    arguments = {"early_layer": "a"} if named else {}
    try:
        found = resolved(LateCut(), table(), **arguments).early_layer
    except GroodError as error:
        assert re.search(r"\bc\b", str(error).partition("early_layer='a'")[2] or str(error))  # noqa: PT017
    else:
        assert found == "c"


def test_one_column_of_data_is_enough_to_tell_a_branch_from_a_cut() -> None:
    torch.manual_seed(0)
    with pytest.raises(GroodError, match="does not carry the whole sample"):
        resolved(LateCut(columns=1), torch.randn(5, 1), early_layer="a")


class Branched(nn.Module):
    """Two branches, each a whole block, that meet before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.join(torch.cat([self.left(x), self.right(x)], 1))
        return self.fc(self.tail(joined).mean((2, 3)))


@pytest.mark.parametrize("first", ["noise", "black", "white"])
def test_a_branch_is_not_taken_for_a_cut(request: pytest.FixtureRequest, first: str) -> None:
    """The first image of a data set may well be blank, as a class-sorted set of scans or of digits starts."""
    torch.manual_seed(0)
    inputs = images()
    if first != "noise":
        inputs[0] = 0.0 if first == "black" else 1.0
    extractor = resolved(Branched(), inputs)
    assert extractor.early_layer == "join"
    assert_cut(extractor, images())


def test_early_layer_does_not_depend_on_which_image_comes_first() -> None:
    torch.manual_seed(0)
    model = ResidualNet()
    blank = torch.cat([torch.full((1, 3, 8, 8), 0.5), images()])
    assert resolved(model, blank).early_layer == resolved(model, images()).early_layer == "layer1"


def test_a_linear_classifier_has_no_early_layer_and_the_error_says_what_to_do() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert resolved(model, patterns(2)[0]).early_layer == "0", "the input itself, where something passes it on"
    with pytest.raises(GroodError, match=r"no early layer of Linear to mix at.*PrototypeMean\(\)"):
        GROOD.paper(nn.Linear(6, 3)).fit(batches(*patterns(12, shape=(6,)), 4))
    inputs, _ = patterns(12)
    labels = torch.arange(12) % 3
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert GROOD(model, outliers=PrototypeMean()).fit(batches(inputs, labels, 4)).fit_info_.n_indexed == 4


def test_layers_with_tuple_outputs_can_be_mixed() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.linear(x).tanh(), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer() for _ in range(4)])
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)[0]
            return self.head(x)

    torch.manual_seed(0)
    extractor = resolved(Net(), table())
    assert extractor.early_layer == "layers.0"
    assert_cut(extractor, table())


def test_a_recurrent_layer_cannot_be_the_early_layer_but_an_lstm_classifier_works() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.lstm(self.embed(x))
            return self.head(out[:, -1])

    torch.manual_seed(0)
    inputs = torch.randn(5, 7, 3)
    extractor = resolved(Net(), inputs)
    assert extractor.head == "head"
    assert_cut(extractor, inputs)


# --- Wrappers, dtypes, lazy modules --------------------------------------------------------------------------------


def test_script_modules_and_functions_are_errors_with_the_remedy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(GroodError, match="TorchScript module takes no hooks; pass the eager module"):
        GROOD(scripted)
    with pytest.raises(GroodError, match=r"expected a torch\.nn\.Module.*got function; .*GROOD\(None\)"):
        GROOD(lambda x: x)  # type: ignore[arg-type]


def test_a_class_instead_of_a_module() -> None:
    with pytest.raises(GroodError, match=r"expected a torch\.nn\.Module.*got type"):
        GROOD(MLP)  # type: ignore[arg-type]


def test_data_parallel_is_looked_through() -> None:
    torch.manual_seed(0)
    model = ResidualNet()
    plain = resolved(model, images())(images())
    wrapped = nn.DataParallel(model)
    with left_alone(wrapped):
        found = resolved(wrapped, images())(images())
    assert torch.equal(found.features, plain.features)
    assert model_fingerprint(wrapped) == model_fingerprint(model)


def compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compile_child(model: nn.Module) -> nn.Module:
    model.layer1 = torch.compile(model.layer1, backend="eager")
    return model


def compile_child_in_place(model: nn.Module) -> nn.Module:
    model.layer1.compile(backend="eager")
    model.fc.compile(backend="eager")
    return model


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_child, compile_child_in_place])
def test_compiled_models_give_the_eager_features(compiled: Callable[[nn.Module], nn.Module], warm: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ResidualNet().eval()
    plain = resolved(model, images())(images())
    mixed = resolved(model, images())(images(), lambda early: 0.5 * early)
    wrapped = compiled(model)
    if warm:
        with torch.no_grad():
            wrapped(images())
    before = snapshot(wrapped)
    extractor = resolved(wrapped, images())
    assert extractor.head == "fc"
    assert torch.equal(extractor(images()).features, plain.features)
    assert torch.equal(extractor(images(), lambda early: 0.5 * early).features, mixed.features)
    assert_cut(extractor, images())
    assert_same_snapshot(before, snapshot(wrapped))
    with torch.no_grad():
        wrapped(images())
    torch._dynamo.reset()


def test_a_compiled_model_is_still_compiled_afterwards() -> None:
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return run

    torch.manual_seed(0)
    model = MLP().eval()
    wrapped = torch.compile(model, backend=backend)
    with torch.no_grad():
        wrapped(table())
        n = len(ran)
        assert n
        resolved(wrapped, table())(table())
        wrapped(table())
    assert len(ran) == n + 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [MLP, cnn, ResidualNet])
def test_other_precisions(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    inputs = table() if make is MLP else images()
    with left_alone(model):
        extractor = resolved(model, inputs)
        found = extractor(inputs)
    assert found.features.dtype == dtype
    assert found.features.isfinite().all()
    assert_cut(extractor, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("outliers", [Mixup(n=10), UniformNoise(n=10), PrototypeMean()], ids=str)
def test_other_precisions_end_to_end(request: pytest.FixtureRequest, dtype: torch.dtype, outliers: Any) -> None:
    model = taught_cnn().to(dtype)
    inputs, labels = patterns(30)
    detector = GROOD(model, outliers=outliers).fit(batches(inputs, labels, 10))
    detector.calibrate(batches(*patterns(30, seed=1), 10), fpr=0.1)
    found = detector.predict(inputs[:10])
    assert found.score.dtype == torch.float64
    assert found.score.isfinite().all()
    assert torch.equal(found.score, torch.zeros(10, dtype=torch.float64)), "training images score exactly 0"
    assert found.neighbor.tolist() == list(range(10))


def test_integer_inputs_stay_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3))
    tokens = torch.randint(50, (6, 5))
    extractor = resolved(model, tokens)
    assert extractor.head == "4"
    assert_cut(extractor, tokens)


def test_a_lazy_model_that_was_never_run_is_initialised_or_refused_but_works() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    try:
        extractor = resolved(model, table())
    except GroodError:
        return
    assert extractor.head == "2"
    assert extractor(table()).features.shape == (5, 8)
    assert_cut(extractor, table())


def test_a_lazy_model_that_was_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
        model(table())
    assert resolved(model, table()).head == "2"


def test_a_model_without_parameters() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Identity()
            self.head = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale(x) * 2)

    extractor = FeatureExtractor(Fixed(), head="head")
    assert torch.equal(extractor(table()).features, 2 * table())


# --- The model is left as it was -----------------------------------------------------------------------------------


def train_mode_cnn() -> nn.Sequential:
    """BatchNorm and dropout in train mode, but for one layer: mixed flags."""
    model = taught_cnn()
    model.train()
    model[3].eval()
    model[3].momentum = 0.5
    model[7].train()
    return model


def all_train_cnn() -> nn.Sequential:
    return taught_cnn().train()


SOURCES = [Mixup(n=10), UniformNoise(n=10), PrototypeMean()]


@pytest.mark.parametrize("outliers", SOURCES, ids=str)
@pytest.mark.parametrize("make", [train_mode_cnn, all_train_cnn])
def test_everything_leaves_the_model_alone(make: Callable[[], nn.Module], outliers: Any) -> None:
    model = make()
    inputs, labels = patterns(30)
    detector = GROOD(model, outliers=outliers)
    with left_alone(model):
        detector.fit(batches(inputs, labels, 10))
        detector.calibrate(batches(*patterns(30, seed=1), 10), fpr=0.1)
        detector.score(inputs)
        detector.predict(inputs)
        detector.extract(batches(inputs, labels, 10))
    assert any(module.training for module in model.modules())


def test_train_mode_gives_the_scores_of_eval_mode() -> None:
    inputs, labels = patterns(30)
    queries, _ = patterns(9, seed=5)
    scores = []
    for mode in (True, False):
        model = taught_cnn().train(mode)
        scores.append(GROOD(model).fit(batches(inputs, labels, 10)).score(queries))
    assert torch.equal(*scores)


def spectral_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    spectral_norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        spectral_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Dropout(0.5), spectral_norm(nn.Linear(16, 16)), nn.ReLU(),
        spectral_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3),
    ).train()  # fmt: skip


def test_the_power_iteration_of_spectral_norm_does_not_move() -> None:
    model = spectral_mlp()
    inputs, labels = patterns(30, shape=(6,))
    teach(model, model[7], inputs, labels)
    with left_alone(model):
        GROOD(model, outliers=Mixup(n=4), early_layer="1").fit(batches(inputs, labels, 10))


def test_an_early_layer_is_found_among_parametrised_layers() -> None:
    """Spectral norm is common in networks made for uncertainty."""
    # The dropout behind the first activation changes nothing in eval mode.
    assert resolved(spectral_mlp(), table()).early_layer == "2"


class Boom(Exception):  # noqa: N818
    """Raised by tests."""


def forward_calls_of(act: Callable[[], Any], module: nn.Module) -> int:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1) or None)
    act()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom, RuntimeError, GroodError])
@pytest.mark.parametrize("where", [0, 3, 8])
def test_an_exception_at_any_forward_call_leaves_the_model_alone(where: int, error: type[BaseException]) -> None:
    """Ctrl-C in each of the model runs of a fit in turn: probing, the pass, mixing."""
    inputs, labels = patterns(20)
    loader = batches(inputs, labels, 10)
    model = train_mode_cnn()
    n_calls = forward_calls_of(lambda: GROOD(model, outliers=Mixup(n=10)).fit(loader), model[where])
    assert n_calls > 5
    for stop in range(n_calls):
        left = stop

        def interrupt(*_: Any) -> None:
            nonlocal left
            if left == 0:
                raise error("stop")
            left -= 1

        handle = model[where].register_forward_hook(interrupt)
        detector = GROOD(model, outliers=Mixup(n=10))
        expected = GroodError if error is RuntimeError else error
        with left_alone(model):
            try:
                detector.fit(loader)
            except expected:
                pass
            else:
                assert left == 0, "the fit must not swallow the exception"
        handle.remove()
        assert repr(detector).endswith("; not fitted)") or left > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
@pytest.mark.parametrize("outliers", SOURCES, ids=str)
def test_an_exception_in_the_loader_or_the_progress_bar(error: type[BaseException], outliers: Any) -> None:
    inputs, labels = patterns(30)
    model = train_mode_cnn()

    def broken(stop: int) -> Iterator[Any]:
        for i, batch in enumerate(batches(inputs, labels, 10)):
            if i == stop:
                raise error
            yield batch
        raise error

    for stop in range(4):
        with left_alone(model), pytest.raises(error):
            GROOD(model, outliers=outliers).fit(broken(stop))

    def bar(iterable: Any) -> Iterator[Any]:
        yield next(iter(iterable))
        raise error

    with left_alone(model), pytest.raises(error):
        GROOD(model, outliers=outliers).fit(batches(inputs, labels, 10), progress=bar)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
def test_an_exception_while_scoring(error: type[BaseException]) -> None:
    inputs, labels = patterns(30)
    model = train_mode_cnn()
    detector = GROOD(model).fit(batches(inputs, labels, 10)).calibrate(patterns(30, seed=1)[0])

    def broken() -> Iterator[Any]:
        yield inputs[:4]
        raise error

    for method in (detector.score, detector.predict, detector.calibrate, detector.extract, detector.log_score):
        with left_alone(model), pytest.raises(error):
            method(broken())


def test_a_failed_probe_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1)).train()
    with left_alone(model), pytest.raises(GroodError):
        resolved(model, images())
    model = ResidualNet().train()
    with left_alone(model), pytest.raises(GroodError):
        resolved(model, images(), early_layer="layer1.0.conv1")
    with left_alone(model), pytest.raises(GroodError):
        resolved(model, images(channels=1))


def test_the_users_own_hooks_keep_working() -> None:
    torch.manual_seed(0)
    model = ResidualNet().eval()
    plain = resolved(model, images())(images())
    seen: list[str] = []
    model.layer1.register_forward_hook(lambda _, __, output: seen.append("layer1") or output * 2)
    model.fc.register_forward_pre_hook(lambda _, args: seen.append("pre") or (args[0] + 1,))
    model.fc.register_forward_hook(lambda _, __, output: seen.append("fc") or output * 3)
    with left_alone(model):
        extractor = resolved(model, images())
        found = extractor(images())
        assert_cut(extractor, images())
    assert {"layer1", "pre", "fc"} <= set(seen)
    with torch.no_grad():
        assert torch.equal(found.logits, model(images()))
    assert not torch.allclose(found.features, plain.features)
    with torch.no_grad():
        torch.testing.assert_close(3 * model.fc.forward(found.features), found.logits)


def test_features_survive_a_model_that_overwrites_them_after_the_head() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.second = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu()).relu()
            z = self.head(h)
            h.zero_()
            return z

    torch.manual_seed(0)
    model = Overwrites()
    feature, _ = by_hand(model, model.head, table())
    assert torch.equal(resolved(model, table())(table()).features, feature)


def test_gradients_and_inference_mode_of_the_caller() -> None:
    model = taught_mlp()
    inputs, labels = patterns(30, shape=(6,))
    inputs.requires_grad_()
    with left_alone(model):
        detector = GROOD(model).fit(batches(inputs, labels, 10))
        score = detector.score(inputs)
    assert not score.requires_grad
    assert inputs.grad is None
    with torch.inference_mode():
        again = GROOD(model).fit(batches(inputs.detach(), labels, 10))
        assert torch.equal(again.score(inputs.detach()), score)
    assert torch.equal(again.score(inputs), score)


def test_autocast_of_the_caller_applies_to_the_model_alone() -> None:
    inputs, labels = patterns(60, shape=(6,))
    queries, _ = patterns(40, shape=(6,), seed=3)
    detector = GROOD(taught_mlp()).fit(batches(inputs, labels, 10))
    features = detector.extract(queries).features
    expected = detector.log_score_features(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detector.log_score_features(features), expected)


def test_default_dtype_of_the_caller() -> None:
    inputs, labels = patterns(30)
    expected = GROOD(taught_cnn(), outliers=UniformNoise(10)).fit(batches(inputs, labels, 10)).score(inputs[:5] + 1)
    model = taught_cnn()
    torch.set_default_dtype(torch.float64)
    try:
        found = GROOD(model, outliers=UniformNoise(10)).fit(batches(inputs, labels, 10)).score(inputs[:5] + 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_unusable_batch_says_what_and_why() -> None:
    extractor = resolved(cnn(), images())
    with pytest.raises(GroodError, match=r"cannot run on a batch of shape \(5, 1, 8, 8\) \(torch.float32\).*channels"):
        extractor(images(channels=1))


def test_block_is_a_residual_block() -> None:
    """The test's own network must have a bypass, or the tests above could not fail."""
    torch.manual_seed(0)
    block = Block(4).eval()
    for parameter in block.conv2.parameters():
        parameter.data.zero_()
    assert torch.equal(block(images(channels=4)), images(channels=4).relu())


def test_weights_that_are_nan_are_named_as_the_cause() -> None:
    model = MLP()
    torch.nn.init.constant_(model.out.weight, torch.nan)
    with pytest.raises(GroodError, match="outputs are NaN or infinite; check its weights"):
        FeatureExtractor(model).resolve(table())
