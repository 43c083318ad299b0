"""What of an error leaves a peer: all in a simulation, from a real site only what its owner would sign."""

import pytest
from federation import SMALL
from sites import make_sites

from clients.answering import answer
from clients.client_app import app
from clients.configuration import PeerConfig
from clients.own_settings import own_settings, without_paths
from clients.peer import Peer
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Mail, pack_mail, unpack_answer

SECRET = "patient 4711"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), peers=2)[0]


class Failing:
    """A peer in which something goes wrong."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        return self

    @property
    def watch(self):
        return self

    def add(self, *_):
        pass

    def answer(self, mail):
        raise self.error


def said(error, site, root, *, kind="learn", simulated=False, **own):
    """Return what the relay hears of an error."""
    changed = {name.replace("_", "-"): value for name, value in own.items()}
    place = PeerConfig.of_own(own_settings({**site, **changed}), name="north", root=root, simulated=simulated)
    settings = {**SMALL, "privacy-epsilon": 1.0 if "max_epsilon" in own else 0.0}
    mail = Mail(kind, 1 if kind == "learn" else 0, RunConfig.from_mapping(settings).to_mapping(), "run")
    return unpack_answer(answer(pack_mail(mail), place, Failing(error))).error


def test_what_an_error_says_that_is_not_the_librarys_stays_with_the_peer(site, tmp_path, capsys):
    assert said(ValueError(SECRET), site, tmp_path) == "ValueError: the peer's log says more"
    assert SECRET in capsys.readouterr().err
    assert said(ValueError(SECRET), site, tmp_path, simulated=True) == f"ValueError: {SECRET}"


def test_the_librarys_errors_go_out_without_the_peers_paths(site, tmp_path, capsys):
    data = site["dataset"].removeprefix("npz:")
    error = FedkdError(f"cannot read '{data}' nor {tmp_path}/north/round-000001.safetensors: gone")

    assert said(error, site, tmp_path) == "cannot read '<dataset>' nor <state-dir>: gone"
    assert data in capsys.readouterr().err
    assert said(error, site, tmp_path, simulated=True) == str(error)


@pytest.mark.parametrize("error", [FedkdError(SECRET), ValueError(SECRET), SystemExit(SECRET)])
def test_under_a_budget_an_error_of_training_is_told_by_its_kind_alone(site, tmp_path, error):
    kind = type(error).__name__
    assert said(error, site, tmp_path, max_epsilon=2.0) == f"{kind}: the peer's log says more"
    assert said(FedkdError("few classes"), site, tmp_path, kind="introduce", max_epsilon=2.0) == "few classes"


def test_under_a_budget_an_error_of_reading_the_data_again_is_told_by_its_kind_alone(site, tmp_path):
    (tmp_path / "data.npz").write_bytes(SECRET.encode())
    broken = {**site, "dataset": f"npz:{tmp_path / 'data.npz'}", "max-epsilon": 2.0}
    place = PeerConfig.of_own(own_settings(broken), name="north", root=tmp_path, simulated=False)
    settings = RunConfig.from_mapping({**SMALL, "privacy-epsilon": 1.0}).to_mapping()

    told = unpack_answer(answer(pack_mail(Mail("learn", 1, settings, "run")), place, Peer)).error

    assert told == "SettingError: the peer's log says more"


def test_code_that_exits_is_an_error_answer_and_a_keyboard_that_interrupts_is_not(site, tmp_path):
    assert said(SystemExit(3), site, tmp_path, simulated=True) == "SystemExit: 3"
    with pytest.raises(KeyboardInterrupt):
        said(KeyboardInterrupt(), site, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file '/a/data.npz'", "no file '<dataset>'"),
        ("/images/train/ada.png is damaged", "<proxy> is damaged"),
        ("in /a/state/north/privacy.json, too", "in <state-dir>, too"),
        ("nothing", "nothing"),
    ],
)
def test_paths_are_told_by_the_settings_that_hold_them(text, told):
    own = {"dataset": "npz:/a/data.npz", "proxy": "folder:/images@32", "state-dir": "/a/state", "checkpoint": ""}
    assert without_paths(text, own) == told


def test_paths_below_the_home_folder_are_not_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert without_paths("no file '/home/ada/.cache/fedkd/data/x.npz'", {}) == "no file '<home>'"
    monkeypatch.setenv("HOME", "/")
    assert without_paths("no file '/x.npz'", {}) == "no file '/x.npz'"


def test_a_mistake_in_a_peers_own_file_is_told_without_where_it_lies(tmp_path):
    from local_grid import LocalGrid

    (tmp_path / "peer.toml").write_text("name =")
    own = {"peer-config": str(tmp_path / "peer.toml"), "simulated": False}
    grid = LocalGrid(app, 1, tmp_path / "state", node_config={0: own})
    mail = pack_mail(Mail("introduce", 0, RunConfig.from_mapping(SMALL).to_mapping(), "run"))

    grid.push_messages([grid.create_message(mail, "train.mail", 1000, "1")])

    error = unpack_answer(grid.replies[0].content).error
    assert "`peer-config` to be a readable TOML file" in error
    assert str(tmp_path) not in error


def test_a_deployed_peer_does_not_say_where_its_code_lies(site, tmp_path):
    place = PeerConfig.of_own(own_settings(site), name="north", root=tmp_path, simulated=False)
    mail = Mail("introduce", 0, RunConfig.from_mapping(SMALL).to_mapping(), "run")

    facts = unpack_answer(answer(pack_mail(mail), place, Peer)).facts

    assert facts["source-root"] == "" and facts["source"]
    assert not any("/" in str(value) for value in facts.values())
