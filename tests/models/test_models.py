"""Models: what builds, from which seed, for which inputs; and checkpoints."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from fedkd import models
from fedkd.data.sources import as_float, load_source
from fedkd.errors import SettingError
from fedkd.models import registry
from fedkd.models.resnet import BasicBlock

SMALL = ["mlp", "cnn-small", "cnn-wide", "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"]
TORCHVISION = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0"]
RGB = (3, 32, 32)


def build(spec, input_shape=RGB, num_classes=10, seed=0, **options):
    return models.build(spec, input_shape=input_shape, num_classes=num_classes, seed=seed, **options)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("input_shape", [(1, 8, 8), (1, 28, 28), RGB, (3, 9, 13)])
@pytest.mark.parametrize("name", SMALL + TORCHVISION)
def test_every_model_trains_on_every_small_image(name, input_shape):
    model = build(name, input_shape, num_classes=7)
    inputs = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))

    logits = model.train()(inputs)
    logits.sum().backward()

    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL + TORCHVISION)
def test_a_sample_is_classified_alike_alone_and_in_company(name):
    model = build(name, (1, 8, 8)).eval()
    inputs = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        assert torch.allclose(model(inputs)[2:3], model(inputs[2:3]), atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "cnn-small", "cnn-wide", "resnet8"])
def test_small_models_learn_digits(name, tmp_path):
    source = load_source("digits", data_dir=tmp_path)
    train, test = (as_float(part.inputs) - 0.3 for part in (source.train, source.test))
    model = build(name, (1, 8, 8))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    for _ in range(4):
        for index in torch.randperm(len(train), generator=generator).split(64):
            optimiser.zero_grad()
            cross_entropy(model(train[index]), source.train.labels[index]).backward()
            optimiser.step()

    with torch.inference_mode():
        accuracy = (model.eval()(test).argmax(dim=1) == source.test.labels).double().mean()
    assert accuracy > 0.85


# --- seeds ---


@pytest.mark.parametrize("name", ["mlp", "cnn-wide", "resnet8", "mobilenet_v3_small"])
def test_weights_are_a_function_of_the_seed(name):
    torch.manual_seed(1)
    first = build(name, seed=5)
    torch.manual_seed(2)

    assert same_weights(first, build(name, seed=5))
    assert not same_weights(first, build(name, seed=6))


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()

    build("resnet8")

    assert torch.equal(torch.random.get_rng_state(), before)


# --- forms ---


@pytest.mark.parametrize("input_shape", [(13,), (4, 6), RGB])
def test_mlp_takes_inputs_of_any_shape(input_shape):
    assert build("mlp", input_shape)(torch.zeros(2, *input_shape)).shape == (2, 10)


@pytest.mark.parametrize("name", ["cnn-small", "cnn-wide", "resnet20", "resnet18"])
def test_image_models_refuse_other_inputs(name):
    with pytest.raises(SettingError, match=r"\[C, H, W\], not \[13\]") as caught:
        build(name, (13,), key="model")
    assert caught.value.key == "model"
    assert caught.value.value == name


@pytest.mark.parametrize("name", SMALL)
def test_double_width_is_about_four_times_the_parameters(name):
    single, double = (models.parameters_count(build(name, width=width)) for width in (1.0, 2.0))

    assert 2 <= double / single <= 4
    assert build(name, width=2.0)(torch.zeros(2, *RGB)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
def test_narrow_models_still_work(name):
    model = build(name, width=0.01)

    assert model(torch.randn(2, *RGB)).isfinite().all()


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_that_cannot_widen_say_so(name):
    with pytest.raises(SettingError, match="widened by 2") as caught:
        build(name, width=2.0)
    assert caught.value.value == name


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"width": 0.0}, {"width": -1.0}])
def test_impossible_forms_are_value_errors(options):
    with pytest.raises(ValueError, match="Expected"):
        build("mlp", **options)


@pytest.mark.parametrize("name", TORCHVISION)
def test_stems_keep_the_resolution_of_small_images_only(name):
    def resolution_after_stem(side):
        seen = []
        model = build(name, (3, side, side)).eval()
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stem.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
        model(torch.zeros(1, 3, side, side))
        return seen[0] / side

    assert resolution_after_stem(32) == 1
    assert resolution_after_stem(96) == 1 / 2


def test_parameters_are_counted_where_they_train():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    model[2].weight.requires_grad = False

    assert models.parameters_count(model) == 4 * 3 + 3 + 3 + 3


def test_resnet20_has_the_published_size():
    # He et al., table 6: 0.27 M parameters; 0.46, 0.66 and 0.85 M for 32, 44 and 56 layers.
    counts = [models.parameters_count(build(f"resnet{n}")) for n in (20, 32, 44, 56)]

    assert [round(count / 1e6, 2) for count in counts] == [0.27, 0.46, 0.66, 0.85]


def test_resnet_shortcut_takes_every_second_position_and_pads_with_zeros():
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # what is left is the shortcut
    x = torch.rand(2, 4, 6, 6)

    out = block(x)

    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().max() == out[:, 6:].abs().max() == 0


# --- the registry ---


def test_names_are_those_that_build():
    assert models.names() == SMALL + TORCHVISION


@pytest.mark.parametrize("spec", ["resnet21", "", "mlp@IMAGENET1K_V1", "resnet21@IMAGENET1K_V1", "a b:c"])
def test_unknown_models_list_what_there_is(spec):
    for refuse in (lambda: models.check(spec, key="models"), lambda: build(spec)):
        with pytest.raises(SettingError, match=r"mlp, .*resnet56.*package\.module:factory") as caught:
            refuse()
        assert caught.value.key == "models"


def test_a_check_needs_no_torch():
    program = (
        "import sys; from fedkd import models\nmodels.check('resnet18'); models.names(); print('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout.split() == [b"False"]


def test_registered_factories_build_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))

    @models.register("tiny")
    def tiny(*, input_shape, num_classes, width=1.0):
        hidden = round(2 * width)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, hidden), nn.Linear(hidden, num_classes))

    assert "tiny" in models.names()
    assert build("tiny")[2].in_features == 2
    assert build("tiny", width=2.0)[2].in_features == 4


@pytest.mark.parametrize("name", ["", "a,b", "a:b", "a@b", "a b"])
def test_names_that_a_list_could_not_hold_are_refused(name):
    with pytest.raises(ValueError, match="without commas"):
        models.register(name)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def tiny(*, input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "def positional(a, b): return nn.Flatten()\n"
        "def number(**form): return 3\n"
        "def broken(*, input_shape, num_classes): raise RuntimeError('no such layer')\n"
        "def transposed(*, input_shape, num_classes): return nn.Flatten(0, 2)\n"
        "constant = 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.usefixtures("own_module")
def test_own_factory_builds_from_the_seed():
    first, second = build("own_models:tiny"), build("own_models:tiny")

    assert first(torch.zeros(2, *RGB)).shape == (2, 10)
    assert models.parameters_count(first) == 3 * 32 * 32 * 10 + 10
    assert same_weights(first, second)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("own_models:positional", "input_shape"),
        ("own_models:number", "returned int"),
        ("own_models:transposed", r"two inputs with \[192, 32\]"),
        ("own_models:broken", "no such layer"),
        ("own_models:constant", "callable"),
        ("own_models:absent", "absent"),
        ("own_nowhere:tiny", "own_nowhere"),
    ],
)
def test_own_factories_that_fail_say_why(spec, words):
    with pytest.raises(SettingError, match=words) as caught:
        build(spec)
    assert caught.value.key == "models"


@pytest.mark.usefixtures("own_module")
def test_own_factory_without_width_cannot_be_widened():
    with pytest.raises(SettingError, match="widened"):
        build("own_models:tiny", width=2.0)


# --- torchvision's weights ---


@pytest.fixture
def hub(monkeypatch):
    """torchvision's own weights, replaced by those of a fresh model: no network, the same way in."""
    from torchvision.models import WeightsEnum, get_model

    asked = []
    made = {}

    def get_state_dict(weights, **options):
        asked.append(options)
        name = str(type(weights).__name__).removesuffix("_Weights").lower()
        torch.manual_seed(0)
        made[name] = get_model(name, num_classes=1000).eval()
        return made[name].state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return asked, made


@pytest.mark.parametrize("name", TORCHVISION)
def test_pretrained_weights_arrive_under_a_new_head(hub, name):
    model = build(f"{name}@IMAGENET1K_V1", num_classes=10)

    asked, made = hub
    theirs, ours = made[name].state_dict(), model.state_dict()
    changed = [key for key in theirs if not torch.equal(theirs[key], ours[key])]
    assert len(changed) == 2
    assert all(ours[key].shape[0] == 10 for key in changed)
    assert all(options["weights_only"] and options["check_hash"] for options in asked)
    assert model(torch.randn(2, *RGB)).shape == (2, 10)


def test_pretrained_head_stays_where_the_classes_are_as_many(hub):
    model = build("resnet18@IMAGENET1K_V1", num_classes=1000)

    assert torch.equal(model.fc.weight, hub[1]["resnet18"].fc.weight)


def test_pretrained_on_grey_answers_as_on_three_equal_channels(hub):
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    model = build("resnet18@IMAGENET1K_V1", (1, 64, 64), num_classes=1000).eval()

    with torch.inference_mode():
        reference = hub[1]["resnet18"](grey.expand(2, 3, 64, 64))
        assert torch.allclose(model(grey), reference, atol=1e-3, rtol=1e-3)


def test_pretrained_errors_name_what_is_allowed(hub, monkeypatch):
    from torchvision.models import WeightsEnum

    with pytest.raises(SettingError, match="IMAGENET1K_V1"):
        build("resnet18@IMAGENET9K")
    with pytest.raises(SettingError, match="5 channels"):
        build("resnet18@IMAGENET1K_V1", (5, 64, 64))
    with pytest.raises(SettingError, match="widened"):
        build("resnet18@IMAGENET1K_V1", width=2.0)
    with pytest.raises(SettingError, match=r"\[C, H, W\]"):
        build("resnet18@IMAGENET1K_V1", (13,))

    def unreachable(weights, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(SettingError, match=r"no route to host") as caught:
        build("resnet18@IMAGENET1K_V1")
    assert caught.value.key == "models"


# --- checkpoints ---


def save(model, path, *, form):
    state = model.state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "safetensors"])
def test_checkpoints_come_back(tmp_path, form):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    saved, model = build("resnet8", seed=1), build("resnet8", seed=2)
    save(saved, path, form=form)

    models.load_checkpoint(model, path)

    assert same_weights(saved, model)


def test_every_mismatch_is_named_at_once_and_nothing_is_loaded(tmp_path):
    model, untouched = build("mlp"), build("mlp")
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state["1.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["5.bias"] = torch.zeros(11)
    torch.save(state, tmp_path / "weights.pt")

    with pytest.raises(SettingError) as caught:
        models.load_checkpoint(model, tmp_path / "weights.pt", key="checkpoint")

    message = str(caught.value)
    for words in ("missing: 1.bias", "unexpected: extra.weight", "5.bias [11] instead of [10]", "weights.pt"):
        assert words in message
    assert same_weights(model, untouched)


def test_a_wholly_other_checkpoint_gives_a_message_one_can_read(tmp_path):
    save(build("resnet56"), tmp_path / "weights.pt", form="plain")

    with pytest.raises(SettingError, match="more") as caught:
        models.load_checkpoint(build("resnet20"), tmp_path / "weights.pt")
    assert len(str(caught.value)) < 1500


class Harmful:
    """What an attacker would put into a file."""

    def __reduce__(self):
        return (print, ("this must never run",))


def test_files_that_are_not_weights_are_refused_and_never_unpickled(tmp_path, capsys):
    torch.save({"weights": Harmful()}, tmp_path / "harmful.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save({}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "nothing.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello, this is not a header")
    save(build("mlp"), tmp_path / "cut.pt", form="plain")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-200])

    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SettingError, match="state dict") as caught:
            models.load_checkpoint(build("mlp"), path, key="checkpoint")
        assert caught.value.value == str(path)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_absent_checkpoint_says_where_it_looked(tmp_path):
    with pytest.raises(SettingError, match=r"absent\.pt"):
        models.load_checkpoint(build("mlp"), tmp_path / "absent.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 91.73), (32, 92.63), (44, 93.11), (56, 93.39)])
def test_published_checkpoints_reach_their_accuracy_on_cifar10(real_data, depth, accuracy):
    path = real_data / "pretrained" / f"cifar10_resnet{depth}.pt"
    if not path.is_file() or not (real_data / "cifar10.npz").is_file():
        pytest.skip(f"FEDKD_DATA has no {path.name} or no cifar10.npz")
    from fedkd.data.normalize import standardizer

    test = load_source("npz:cifar10.npz", data_dir=real_data).test
    model = build(f"resnet{depth}")
    models.load_checkpoint(model, path)
    inputs = standardizer("imagenet", test.inputs)(test.inputs)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            predicted = torch.cat([model.eval()(batch).argmax(dim=1) for batch in inputs.split(500)])
    finally:
        torch.set_num_threads(threads)

    reached = 100 * (predicted == test.labels).double().mean().item()
    print(f"resnet{depth}: {reached:.2f} %")
    assert len(predicted) == 10_000
    assert reached == pytest.approx(accuracy, abs=0.1)
