"""Sources: what a name loads, and what a user is told when it can't be loaded."""

import gzip
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.data import torchvision_sets
from fedkd.data.sources import Dataset, as_float, load_source
from fedkd.errors import SettingError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        "classes": np.array(["ant", "bee", "cat"]),
    }


# --- digits ---


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    reference = load_digits()
    source = load_source("digits", data_dir=tmp_path)

    images = torch.cat([source.train.inputs, source.test.inputs])
    labels = torch.cat([source.train.labels, source.test.labels])
    levels = (as_float(images) * 16).round().to(torch.int64).flatten(1).numpy()
    ours = sorted((label, *row) for label, row in zip(labels.tolist(), levels.tolist(), strict=True))
    theirs = sorted(
        (label, *row) for label, row in zip(reference.target.tolist(), reference.data.astype(int).tolist(), strict=True)
    )
    assert ours == theirs
    assert source.classes == tuple(str(name) for name in reference.target_names)


def test_digits_split_is_fixed_and_stratified(tmp_path):
    first, second = (load_source("digits", data_dir=tmp_path) for _ in range(2))

    assert torch.equal(first.test.inputs, second.test.inputs)
    train, test = (torch.bincount(part.labels, minlength=10) for part in (first.train, first.test))
    assert torch.allclose(test / (train + test), torch.tensor(0.2), atol=0.005)


def test_digits_load_without_importing_scikit_learn():
    program = (
        "import sys; from pathlib import Path; from fedkd.data.sources import load_source;"
        "load_source('digits', data_dir=Path('.')); print('sklearn' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout.split() == [b"False"]


def test_digits_without_scikit_learn_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(SettingError, match=r"`dataset`.*scikit-learn"):
        load_source("digits", data_dir=tmp_path)


# --- npz ---


def test_npz_images_become_channels_first(tmp_path, arrays):
    np.savez(tmp_path / "set.npz", **arrays)

    source = load_source("npz:set.npz", data_dir=tmp_path)

    assert source.train.inputs.dtype == torch.uint8
    assert source.train.inputs.shape == (12, 3, 5, 4)
    assert source.train.inputs[7, 2, 4, 1] == arrays["x_train"][7, 4, 1, 2]
    assert source.test.labels.tolist() == arrays["y_test"].tolist()
    assert source.classes == ("ant", "bee", "cat")


def test_npz_by_absolute_path(tmp_path, arrays):
    np.savez(tmp_path / "set.npz", **arrays)

    assert len(load_source(f"npz:{tmp_path / 'set.npz'}", data_dir=tmp_path / "elsewhere").train) == 12


def test_npz_features_keep_their_values(tmp_path, arrays):
    features = {"x_train": np.linspace(-5, 300, 24).reshape(12, 2), "x_test": np.ones((6, 2), dtype=np.uint8)}
    np.savez(tmp_path / "set.npz", **{**arrays, **features})

    source = load_source("npz:set.npz", data_dir=tmp_path)

    assert source.train.inputs.dtype == source.test.inputs.dtype == torch.float32
    assert torch.allclose(as_float(source.train.inputs), torch.from_numpy(features["x_train"]).float())
    assert torch.equal(source.test.inputs, torch.ones(6, 2))


def test_npz_without_classes_names_them_by_number(tmp_path, arrays):
    del arrays["classes"]
    np.savez(tmp_path / "set.npz", **arrays)

    assert load_source("npz:set.npz", data_dir=tmp_path).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_train": np.zeros((12, 5, 4, 3), dtype=np.int64)}, "x_train"),
        ({"x_train": np.zeros(12)}, "x_train"),
        ({"y_train": np.zeros(12)}, "y_train"),
        ({"y_train": np.zeros((12, 1), dtype=int)}, "y_train"),
        ({"y_train": np.zeros(11, dtype=int)}, "12 inputs"),
        ({"y_train": np.full(12, 3)}, "from 3 to 3"),
        ({"y_train": np.full(12, -1)}, "from -1 to -1"),
        ({"x_test": np.zeros((6, 5, 5, 3), dtype=np.uint8)}, "one shape"),
        ({"x_test": np.zeros((6, 5, 4, 3), dtype=np.float32)}, "one type"),
        ({"x_test": np.zeros((0, 5, 4, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}, "at least one test"),
        ({"x_train": np.full((12, 2), np.nan), "x_test": np.zeros((6, 2))}, "NaN"),
        ({"classes": np.array(["all"]), "y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "two classes"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "pickled"),
    ],
)
def test_npz_that_is_not_well_formed_is_refused(tmp_path, arrays, changes, words):
    changed = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(tmp_path / "set.npz", **changed)

    with pytest.raises(SettingError, match=words) as caught:
        load_source("npz:set.npz", data_dir=tmp_path, key="proxy")
    assert caught.value.key == "proxy"


def test_files_that_are_no_npz_are_refused(tmp_path, arrays):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", arrays["x_train"])
    np.savez_compressed(tmp_path / "whole.npz", **arrays)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])

    for name in ("text.npz", "one.npy", "cut.npz"):
        with pytest.raises(SettingError, match="npz file"):
            load_source(f"npz:{name}", data_dir=tmp_path)


def test_absent_npz_says_where_it_looked(tmp_path):
    with pytest.raises(SettingError, match=str(tmp_path / "absent.npz")):
        load_source("npz:absent.npz", data_dir=tmp_path)


# --- folder ---


def save_images(root, *, sizes=((6, 4),), mode="RGB"):
    """Two classes; one test image and two training images each, of the sizes in turn."""
    names = [("train", c, i) for c in ("cat", "dog") for i in range(2)] + [("test", c, 0) for c in ("cat", "dog")]
    for n, (part, label, i) in enumerate(names):
        folder = root / part / label
        folder.mkdir(parents=True, exist_ok=True)
        shade = 20 * (n + 1)
        Image.new(mode, sizes[n % len(sizes)], shade if mode in ("L", "I;16") else (shade, 0, 255)).save(
            folder / f"{i}.png"
        )


def test_folder_gives_images_labels_and_classes(tmp_path):
    save_images(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("not an image")

    source = load_source("folder:pets", data_dir=tmp_path)

    assert source.classes == ("cat", "dog")
    assert source.train.inputs.shape == (4, 3, 4, 6)
    assert source.train.inputs[:, :, 0, 0].tolist() == [[20, 0, 255], [40, 0, 255], [60, 0, 255], [80, 0, 255]]
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert source.test.labels.tolist() == [0, 1]


def test_folder_of_grey_images_has_one_channel(tmp_path):
    save_images(tmp_path, mode="L")

    source = load_source("folder:.", data_dir=tmp_path)

    assert source.train.inputs[:, :, 0, 0].tolist() == [[20], [40], [60], [80]]


def test_folder_with_one_colour_image_is_rgb(tmp_path):
    save_images(tmp_path, mode="L")
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "test" / "dog" / "0.png")

    assert load_source("folder:.", data_dir=tmp_path).train.inputs[:, :, 0, 0].tolist()[0] == [20, 20, 20]


def test_folder_of_mixed_sizes_needs_a_size(tmp_path):
    save_images(tmp_path / "pets", sizes=((6, 4), (8, 8)))

    with pytest.raises(SettingError, match=r"@SIZE.*6×4.*8×8"):
        load_source("folder:pets", data_dir=tmp_path)
    assert load_source("folder:pets@5", data_dir=tmp_path).test.inputs.shape == (2, 3, 5, 5)


def test_folder_whose_name_ends_like_a_size_is_that_folder(tmp_path):
    save_images(tmp_path / "pets@5")

    assert load_source("folder:pets@5", data_dir=tmp_path).train.inputs.shape == (4, 3, 4, 6)


def test_folder_errors_name_the_place(tmp_path):
    save_images(tmp_path)
    for damage, words in [
        (lambda: (tmp_path / "train" / "cat" / "9.png").write_bytes(b"no image"), "9.png"),
        (lambda: Image.new("I;16", (6, 4)).save(tmp_path / "train" / "cat" / "9.png"), "8 bits"),
        (lambda: (tmp_path / "test" / "owl").mkdir(), "owl"),
    ]:
        damage()
        with pytest.raises(SettingError, match=words):
            load_source("folder:.", data_dir=tmp_path)
    with pytest.raises(SettingError, match="absent"):
        load_source("folder:absent", data_dir=tmp_path)


def test_truncated_image_is_named(tmp_path):
    save_images(tmp_path, sizes=((60, 40),))
    damaged = tmp_path / "train" / "dog" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])

    with pytest.raises(SettingError, match=r"1\.png"):
        load_source("folder:.", data_dir=tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)

    with pytest.raises(SettingError, match="train/CLASS"):
        load_source("folder:.", data_dir=tmp_path)


# --- torchvision's sets ---


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def save_mnist(folder, *, packed):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, size in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        for kind, content in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
            path = folder / f"{part}-{kind}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files_are_read_as_torchvision_reads_them(tmp_path, packed):
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    save_mnist(raw, packed=packed)

    source = load_source("fashion-mnist", data_dir=tmp_path)

    for path in raw.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    for part, train in ((source.train, True), (source.test, False)):
        reference = FashionMNIST(str(tmp_path), train=train)
        assert torch.equal(part.inputs[:, 0], reference.data)
        assert torch.equal(part.labels, reference.targets)
    assert source.classes == tuple(FashionMNIST.classes)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_absent_sets_say_where_they_were_looked_for(tmp_path, name, place):
    with pytest.raises(SettingError) as caught:
        load_source(name, data_dir=tmp_path, key="proxy")

    assert caught.value.key == "proxy"
    assert str(tmp_path / place) in str(caught.value)
    assert "download = true" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_incomplete_or_damaged_files_are_refused(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    save_mnist(raw, packed=True)
    labels = raw / "t10k-labels-idx1-ubyte.gz"

    for content in (labels.read_bytes()[:-9], gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"), b"no gzip"):
        labels.write_bytes(content)
        with pytest.raises(SettingError, match="mnist"):
            load_source("mnist", data_dir=tmp_path)
    labels.unlink()
    with pytest.raises(SettingError, match="complete"):
        load_source("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "place"), [("cifar10", "cifar-10-batches-py"), ("svhn", "train_32x32.mat")])
def test_files_that_are_not_the_published_ones_are_not_opened(tmp_path, name, place):
    (tmp_path / place).mkdir()

    with pytest.raises(SettingError, match="complete"):
        load_source(name, data_dir=tmp_path)


@pytest.fixture
def any_checksum(monkeypatch):
    """Let torchvision take made-up files for the published ones."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.usefixtures("any_checksum")
def test_cifar10_is_read_from_torchvisions_layout(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for n, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.zeros((2, 3, 32, 32), dtype=np.uint8)
        pixels[:, 0], pixels[:, 1, 4, 7] = n, 99
        content = {"data": pixels.reshape(2, -1), "labels": [n, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))

    source = load_source("cifar10", data_dir=tmp_path)

    assert source.train.inputs.shape == (10, 3, 32, 32)
    assert source.train.inputs[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert source.test.inputs[0, 1, 4, 7] == 99
    assert source.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert source.test.labels.tolist() == [5, 9]
    assert source.classes == tuple(names)


@pytest.mark.usefixtures("any_checksum")
def test_svhn_is_read_from_torchvisions_layout(tmp_path):
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for split in ("train", "test"):
        # The files say 10 for the digit 0.
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[1], [10], [2], [9]])})

    source = load_source("svhn", data_dir=tmp_path)

    assert source.train.inputs.shape == (4, 3, 32, 32)
    assert source.train.inputs[2, 1, 30, 5] == images[30, 5, 1, 2]
    assert source.test.labels.tolist() == [1, 0, 2, 9]


def test_download_happens_once_and_only_where_allowed(tmp_path, monkeypatch):
    downloads = []

    def download(name, data_dir):
        downloads.append(name)
        save_mnist(data_dir / "MNIST" / "raw", packed=False)

    monkeypatch.setattr(torchvision_sets, "_download", download)

    with pytest.raises(SettingError):
        load_source("mnist", data_dir=tmp_path)
    assert downloads == []
    sources = [load_source("mnist", data_dir=tmp_path, download=True) for _ in range(2)]
    assert downloads == ["mnist"]
    assert len(sources[1].train) == 20


def test_failed_download_is_a_settings_error(tmp_path, monkeypatch):
    def download(name, data_dir):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision_sets, "_download", download)

    with pytest.raises(SettingError, match="no route to host"):
        load_source("svhn", data_dir=tmp_path, download=True)


# --- one's own ---


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    def write(body):
        (tmp_path / "own_data.py").write_text(f"import numpy as np, torch\n{body}")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "own_data", raising=False)

    return write


def test_own_function_may_return_arrays_or_a_source(own_module, tmp_path):
    own_module(
        "from fedkd.data.sources import Dataset, Source\n"
        "x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 1, 0])\n"
        "def arrays(): return x, y, x[:2], y[:2]\n"
        "def source():\n"
        "    part = Dataset(torch.zeros(2, 5), torch.tensor([0, 1]))\n"
        "    return Source('mine', part, part, ('no', 'yes'))\n"
    )

    assert load_source("own_data:arrays", data_dir=tmp_path).train.inputs.shape == (4, 1, 8, 8)
    assert load_source("own_data:source", data_dir=tmp_path).classes == ("no", "yes")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def load(): return 7", "int"),
        ("def load(path): return path", "without arguments"),
        ("def load(): raise RuntimeError('disk full')", "disk full"),
        ("load = 3", "callable"),
        ("raise ValueError('broken module')", "broken module"),
        ("def load(): return np.zeros((2, 3)), [0, 1], np.zeros((2, 3)), [0, 'a']", "y_test"),
        (
            "from fedkd.data.sources import Dataset, Source\n"
            "def load():\n"
            "    part = Dataset(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 1]))\n"
            "    return Source('mine', part, part, ('no', 'yes'))",
            "float64",
        ),
    ],
)
def test_own_functions_that_fail_say_why(own_module, tmp_path, body, words):
    own_module(body)

    with pytest.raises(SettingError, match=words):
        load_source("own_data:load", data_dir=tmp_path)


@pytest.mark.parametrize("spec", ["", "digit", "npz:", "folder:", "cifar10:x y", "no/such:thing"])
def test_unknown_specs_list_what_there_is(tmp_path, spec):
    with pytest.raises(SettingError, match=r"fashion-mnist.*npz:PATH.*package\.module:function"):
        load_source(spec, data_dir=tmp_path)


def test_module_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SettingError, match="No module named 'nowhere'"):
        load_source("nowhere:load", data_dir=tmp_path)


# --- the containers ---


def test_subset_keeps_inputs_and_labels_together():
    whole = Dataset(torch.arange(10).float().view(10, 1), torch.arange(10))

    part = whole.subset(np.array([7, 2]))

    assert part.inputs.flatten().tolist() == part.labels.tolist() == [7, 2]
    assert len(part) == 2
