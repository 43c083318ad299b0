"""Sets of Hugging Face's library: saved to disk, in parquet files, or named on the hub."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from fedkd.data.sources import load_public, load_source
from fedkd.errors import SettingError

PETS = Features({"photo": Image(), "kind": ClassLabel(names=["cat", "dog"]), "id": Value("int64")})
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Show no bars, and keep from what this machine has cached."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(features=PETS, images=IMAGES):
    pictures, labels = [Pillow.fromarray(image) for image in images], [number % 2 for number in range(len(images))]
    values = {"photo": pictures, "thumbnail": pictures, "kind": labels, "sex": labels, "id": [7] * len(images)}
    return datasets.Dataset.from_dict({name: values[name] for name in features}, features=features)


def pets(features=PETS):
    return DatasetDict(train=table(features), test=table(features, IMAGES[:2]))


def save_parquet(folder, sets):
    folder.mkdir()
    for split, rows in sets.items():
        rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def is_pets(source):
    return (
        torch.equal(source.train.inputs, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
        and source.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
        and (len(source.test), source.classes, source.named) == (2, ("cat", "dog"), True)
    )


@pytest.mark.parametrize("kind", ["hf", "parquet"])
def test_a_saved_set_and_parquet_files_are_read_alike(tmp_path, kind):
    pets().save_to_disk(tmp_path / "saved")
    save_parquet(tmp_path / "files", pets())

    assert is_pets(load_source("hf:saved", data_dir=tmp_path))
    assert is_pets(load_source(f"{kind}:files", data_dir=tmp_path))
    assert is_pets(load_source(f"{kind}:{tmp_path / 'files'}#photo,kind", data_dir=tmp_path / "elsewhere"))


def test_images_are_resized_to_the_size_after_the_path(tmp_path):
    save_parquet(tmp_path / "files", pets())

    assert load_source("parquet:files#photo,kind@8", data_dir=tmp_path).train.inputs.shape == (6, 3, 8, 8)
    assert load_source("parquet:files@8", data_dir=tmp_path).train.inputs.shape == (6, 3, 8, 8)


def test_a_validation_split_stands_for_a_test_set(tmp_path):
    save_parquet(tmp_path / "files", {"train": table(), "validation": table(images=IMAGES[:2])})

    assert is_pets(load_source("hf:files", data_dir=tmp_path))


@pytest.mark.parametrize("labelled", [False, True])
def test_one_file_is_a_proxy_set_with_or_without_labels(tmp_path, labelled):
    features = PETS if labelled else Features({"photo": Image()})
    table(features).to_parquet(str(tmp_path / "public.parquet"))

    public = load_public("parquet:public.parquet", data_dir=tmp_path)

    assert torch.equal(public.inputs, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert (public.labels is None) is not labelled


def test_encoded_files_of_other_programs_are_images(tmp_path):
    import io

    import pyarrow as pa
    from pyarrow import parquet

    def png(image):
        buffer = io.BytesIO()
        Pillow.fromarray(image).save(buffer, format="PNG")
        return buffer.getvalue()

    files = [png(image) for image in IMAGES]
    parquet.write_table(pa.table({"image": files, "name": list("abcdef")}), tmp_path / "a.parquet")
    nested = [{"bytes": file, "path": None} for file in files]
    parquet.write_table(pa.table({"image": nested}), tmp_path / "b.parquet")

    for name in ("a", "b"):
        public = load_public(f"parquet:{name}.parquet", data_dir=tmp_path)
        assert torch.equal(public.inputs, torch.from_numpy(IMAGES).permute(0, 3, 1, 2)) and public.labels is None


TWO_IMAGES = Features({**PETS, "thumbnail": Image()})
TWO_LABELS = Features({**PETS, "sex": ClassLabel(names=["f", "m"])})


@pytest.mark.parametrize(
    ("features", "columns", "words"),
    [
        (TWO_IMAGES, "", r"one column of images, .*2 \(photo, thumbnail\): .*PATH#IMAGE,LABEL; it has photo \(Image\)"),
        (TWO_LABELS, "", r"one column of labels, .*2 \(kind, sex\)"),
        (Features({"id": Value("int64")}), "", "one column of images, .*none"),
        (Features({"photo": Image()}), "", "one column of labels, .*none"),
        (PETS, "#picture", r"a column 'picture'; it has photo \(Image\), kind \(ClassLabel\), id \(int64\)"),
        (PETS, "#id,kind", "'id' holds images"),
        (TWO_IMAGES, "#photo,thumbnail", "'thumbnail' holds labels"),
        (PETS, "#photo,kind,id", "at most two columns"),
    ],
)
def test_columns_that_are_not_clear_are_listed_with_the_way_to_say(tmp_path, features, columns, words):
    pets(features).save_to_disk(tmp_path / "saved")

    with pytest.raises(SettingError, match=words) as caught:
        load_source(f"hf:saved{columns}", data_dir=tmp_path)
    assert caught.value.key == "dataset" and "\n" not in str(caught.value)


def test_columns_that_are_named_are_taken(tmp_path):
    pets(Features({**TWO_IMAGES, **TWO_LABELS})).save_to_disk(tmp_path / "saved")

    assert load_source("hf:saved#thumbnail,sex", data_dir=tmp_path).classes == ("f", "m")
    assert load_public("hf:saved#photo", data_dir=tmp_path).labels is None


def test_labels_that_are_not_known_are_refused(tmp_path):
    rows = {"photo": [Pillow.fromarray(image) for image in IMAGES], "kind": [-1] * 6, "id": [0] * 6}
    hidden = datasets.Dataset.from_dict(rows, features=PETS)
    DatasetDict(train=table(), test=hidden).save_to_disk(tmp_path / "saved")

    with pytest.raises(SettingError, match=r"labels are known in every row.*'kind'"):
        load_source("hf:saved", data_dir=tmp_path)


def test_a_set_without_a_split_says_which_it_has(tmp_path):
    DatasetDict(train=table(), extra=table()).save_to_disk(tmp_path / "saved")

    with pytest.raises(SettingError, match="a split test; it has train, extra"):
        load_source("hf:saved", data_dir=tmp_path)


def test_an_image_that_cannot_be_read_is_named_by_its_row(tmp_path):
    rows = {"photo": [{"bytes": b"no image", "path": None}], "kind": [0], "id": [0]}
    datasets.Dataset.from_dict(rows, features=PETS).to_parquet(str(tmp_path / "bad.parquet"))

    with pytest.raises(SettingError, match=r"'photo' of row 0 \(train\) cannot be"):
        load_public("parquet:bad.parquet", data_dir=tmp_path)


def test_what_is_not_there_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    for spec, words in [
        ("parquet:nowhere", "existing file or folder"),
        ("hf:empty", "folder of `save_to_disk`, or of parquet files"),
        ("hf:a/b/c", "existing file or folder"),
        ("parquet:broken.parquet", "can be read"),
    ]:
        with pytest.raises(SettingError, match=words):
            load_source(spec, data_dir=tmp_path)


def test_a_name_of_the_hub_asks_nobody_unless_that_is_allowed(tmp_path, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)

    with pytest.raises(SettingError, match=r"on this machine.*`download = true`"):
        load_source("hf:nobody/nothing", data_dir=tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def unreachable(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)

    with pytest.raises(SettingError, match=r"could not be fetched \(ConnectionError: no route to host\).*save_to_disk"):
        load_source("hf:nobody/nothing", data_dir=tmp_path, download=True)
    assert asked == ["nobody/nothing"]


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(SettingError, match=r"pip install 'fedkd\[datasets\]'"):
        load_source("hf:saved", data_dir=tmp_path)
