"""A proxy set without labels, of as many samples as there are."""

import json

import numpy as np
import pytest
from federation import federate, killed, local_grid
from sites import deployed, make_sites

from experiments.analysis.runs import read_run
from experiments.report.agreement import agreement
from fedkd.data.sources import load_source
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import unpack_answer

ALL = {"proxy_size": 0}


@pytest.fixture
def public(tmp_path):
    """Write 70 digits and nothing else; return the setting that names them."""
    images = load_source("digits", data_dir=tmp_path).train.inputs[:70, 0].numpy()
    np.savez(tmp_path / "public.npz", pictures=images)
    return f"npz:{tmp_path / 'public.npz'}"


def travelled(run):
    """Return how many samples' logits the peers' answers are about."""
    answers = [unpack_answer(reply.content) for reply in run.grid.replies]
    return {len(answer.arrays["logits"]) for answer in answers if "logits" in answer.arrays}


def test_all_of_an_unlabelled_proxy_set_is_used_and_it_has_no_channel_control(tmp_path, public, capsys):
    run = federate(tmp_path, proxy=public, controls="isolated,channel", **ALL)

    assert {row["status"] for row in run.rows()} == {"ok"} and travelled(run) == {70}
    assert run.summary()["channel"] is None and run.summary()["isolated"] is not None
    assert "the labels of the proxy set are not known" in capsys.readouterr().out


def test_a_report_knows_how_many_samples_there_were(tmp_path, public):
    run = read_run(federate(tmp_path, proxy=public, **ALL).folder)

    peers, shares = agreement(run)
    assert run.settings["proxy-size"] == 70 and len(peers) == 3 and (shares > 0).all()


def test_all_of_it_is_what_its_number_would_draw(tmp_path, public):
    runs = [federate(tmp_path / str(size), 2, proxy=public, proxy_size=size) for size in (0, 70)]

    assert runs[0].timeless_rows() == runs[1].timeless_rows()


def test_a_part_of_it_is_used_where_a_number_is_given_or_drawn(tmp_path, public):
    assert travelled(federate(tmp_path / "some", 2, proxy=public, proxy_size=30)) == {30}
    assert travelled(federate(tmp_path / "drawn", 2, proxy=public, proxy_per_round=20, **ALL)) == {20}


def test_split_takes_400_as_it_always_did(tmp_path):
    runs = [federate(tmp_path / str(size), 2, proxy_size=size, rounds=1) for size in (0, 400)]

    assert travelled(runs[0]) == {400} and runs[0].timeless_rows() == runs[1].timeless_rows()
    old, new = (read_run(run.folder).settings["proxy-size"] for run in runs)
    assert old == new


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"proxy_per_round": 71}, "`proxy-per-round` to be at most 70, the samples of the proxy set"),
        ({"proxy_size": 71}, "`proxy-size` to be from 1 to 70, as there are 70 samples"),
    ],
)
def test_more_than_there_are_is_refused_before_anyone_trains(tmp_path, public, settings, complaint):
    with pytest.raises(FedkdError, match=complaint):
        federate(tmp_path, 2, proxy=public, **{**ALL, **settings})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_real_peers_use_all_of_their_own(tmp_path):
    sites = make_sites(tmp_path / "sites", 2, proxy_size=45)

    run = federate(tmp_path, grid=local_grid(tmp_path, 2, node_config=deployed(sites)), seats=2, **ALL)

    assert travelled(run) == {45}
    assert json.loads((run.folder / "config.json").read_text())["proxy_samples"] == 45


def test_a_real_peers_own_limit_holds_for_all_of_its_own(tmp_path):
    grid = local_grid(tmp_path, 2, node_config=deployed(make_sites(tmp_path / "sites", 2), max_proxy_size=59))

    with pytest.raises(FedkdError, match=r"`proxy-size` to be at most 59 \(this peer's `max-proxy-size`\), but got 60"):
        federate(tmp_path, grid=grid, seats=2, **ALL)


def test_peers_whose_proxy_sets_have_other_sizes_are_named_with_them(tmp_path):
    sites = make_sites(tmp_path / "sites", 2)
    sites[1]["proxy"] = make_sites(tmp_path / "others", 2, proxy_size=50)[1]["proxy"]
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))

    with pytest.raises(FedkdError, match=r"proxy set \(\d+, 1, 8, 8\) differ from the others' \(\d+, 1, 8, 8\)$"):
        federate(tmp_path, grid=grid, seats=2, **ALL)


def test_a_run_goes_on_with_all_of_its_proxy_set(tmp_path, public):
    whole = federate(tmp_path / "whole", 2, proxy=public, **ALL)
    grid = killed(tmp_path / "part", 2, peer=1, round=2, proxy=public, **ALL)

    resumed = federate(tmp_path / "part", 2, grid=grid, resume=str(tmp_path / "part" / "run"), proxy=public, **ALL)

    assert resumed.timeless_rows() == whole.timeless_rows()


def test_one_sample_is_too_few_for_information_flow():
    with pytest.raises(FedkdError, match="at least 2 that travel"):
        RunConfig(method="infoflow", proxy="npz:one.npz").knowing(1)


def other_form(site, path):
    """Write a site's images as RGB of twice the size, and name them."""
    with np.load(site["dataset"].removeprefix("npz:")) as content:
        arrays = dict(content)
    for part in ("x_train", "x_test"):
        arrays[part] = np.repeat(arrays[part].repeat(2, axis=1).repeat(2, axis=2), 3, axis=3)
    np.savez(path, **arrays)
    return {**site, "dataset": f"npz:{path}"}


def test_sites_whose_images_differ_need_a_form(tmp_path):
    sites = make_sites(tmp_path / "sites", 2)
    sites[1] = other_form(sites[1], tmp_path / "large.npz")
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))

    with pytest.raises(FedkdError, match=r"\(60, (3, 16, 16|1, 8, 8)\) differ .* \(60, (3, 16, 16|1, 8, 8)\)$"):
        federate(tmp_path / "as they are", grid=grid, seats=2)
    run = federate(tmp_path / "formed", grid=grid, seats=2, image_size=12, image_channels=1)

    assert {row["status"] for row in run.rows()} == {"ok"}


def test_a_real_peer_bounds_the_size_of_its_images(tmp_path):
    grid = local_grid(tmp_path, 2, node_config=deployed(make_sites(tmp_path / "sites", 2), max_image_size=32))

    with pytest.raises(FedkdError, match=r"`image-size` to be at most 32 \(this peer's `max-image-size`\)"):
        federate(tmp_path, grid=grid, seats=2, image_size=64)
