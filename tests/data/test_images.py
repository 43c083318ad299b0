"""Image files: read as people see them, or refused by the file's name."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from fedkd.data.sources import load_source
from fedkd.errors import SettingError

PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)
PICTURE[0, 0] = 200, 100, 50


def save(root, *, parts=("train", "test"), classes=("cat", "dog"), suffix=".png"):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(PICTURE).save(root / part / name / f"0{suffix}")
    return root


def load(root):
    return load_source(f"folder:{root}", data_dir=root)


# --- what is an image, and in which class ---


def test_what_archives_and_systems_leave_behind_is_no_class(tmp_path, caplog):
    save(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "__MACOSX" / "cat").mkdir(parents=True)
        (tmp_path / part / "__MACOSX" / "cat" / "._0.png").write_bytes(b"resource fork")
        (tmp_path / part / ".thumbnails").mkdir()

    with caplog.at_level(logging.WARNING):
        source = load(tmp_path)

    assert source.classes == ("cat", "dog") and len(source.train) == 2
    assert "left out 4 files or folders" in caplog.text and len(caplog.records) == 1


def test_a_class_may_have_folders_of_its_own(tmp_path):
    save(tmp_path)
    for year in ("2024", "2023"):
        (tmp_path / "train" / "cat" / year).mkdir()
        Image.new("RGB", (6, 4), (int(year) - 2000,) * 3).save(tmp_path / "train" / "cat" / year / "a.png")

    source = load(tmp_path)

    assert source.train.labels.tolist() == [0, 0, 0, 1]
    assert source.train.inputs[1:3, 0, 0, 0].tolist() == [23, 24]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".dib", ".tga"])
def test_usual_suffixes_are_images(tmp_path, suffix):
    save(tmp_path)
    image = Image.fromarray(PICTURE)
    image.save(tmp_path / "train" / "cat" / f"1{suffix}", format=Image.registered_extensions()[suffix.lower()])

    assert load(tmp_path).train.labels.tolist() == [0, 0, 1]


def test_a_class_of_other_files_alone_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "train" / "owl").mkdir()
    for number in range(2):
        (tmp_path / "train" / "owl" / f"{number}.heic").touch()

    with pytest.raises(SettingError, match=r"owl is only 2 files or folders \(2 .heic\)"):
        load(tmp_path)


def test_a_class_may_be_empty_but_for_what_keeps_its_folder(tmp_path):
    save(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "owl").mkdir()
        (tmp_path / part / "owl" / ".gitkeep").touch()

    assert load(tmp_path).classes == ("cat", "dog", "owl")


def test_what_is_left_out_is_said_once_with_its_number(tmp_path, caplog):
    save(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "dog" / "0.heic").touch()
    Image.fromarray(PICTURE).save(tmp_path / "train" / "loose.png")

    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path).train) == 2

    (record,) = caplog.records
    assert "left out 3 files or folders (1 .png, 1 .txt, 1 .heic)" in record.getMessage()


def test_images_beside_no_class_say_where_they_are(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.fromarray(PICTURE).save(tmp_path / part / "0.png")

    with pytest.raises(SettingError, match=r"train/CLASS/.*but 1 that are in no class"):
        load(tmp_path)


# --- how one is read ---


def test_a_camera_held_sideways_is_turned_upright(tmp_path):
    save(tmp_path)
    turned = Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned.save(tmp_path / "train" / "cat" / "0.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "train" / "cat" / "0.png")).size == (6, 4)

    source = load(tmp_path)

    assert torch.equal(source.train.inputs[0], source.train.inputs[1])


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA"])
def test_other_colours_are_read_as_rgb(tmp_path, mode):
    save(tmp_path)
    suffix = ".tif" if mode == "CMYK" else ".png"
    (tmp_path / "train" / "cat" / "0.png").unlink()
    Image.fromarray(PICTURE).convert(mode).save(tmp_path / "train" / "cat" / f"0{suffix}")

    source = load(tmp_path)

    difference = source.train.inputs[0].int() - source.train.inputs[1].int()
    assert difference.abs().max() <= 5


def damage(path, how):
    if how == "text":
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "x" * 2_000_000, zip=True)
        Image.fromarray(PICTURE).save(path, pnginfo=text)
    elif how == "16 bits":
        Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16)).save(path)
    elif how == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["text", "16 bits", "cut", "empty"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, part, how):
    save(tmp_path)
    damage(tmp_path / part / "dog" / "0.png", how)

    with pytest.raises(SettingError, match=rf"`dataset`.*{part}/dog/0\.png") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
