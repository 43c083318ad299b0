"""What `fedkd deploy init` makes for each party, and what it refuses to make."""

import json
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import psutil
import pytest
from deployed import new_deployment
from typer.testing import CliRunner

from experiments.cli import app as cli
from experiments.deploy import trial
from experiments.deploy.create import create
from experiments.deploy.layout import CONNECTION, Deployment
from experiments.launch.superlink import LaunchError, free_port
from fedkd.errors import FedkdError, SettingError
from fedkd.wire.identities import Identity, read_trusted


def test_init_makes_what_the_readme_then_runs(tmp_path):
    folder = tmp_path / "d"

    said = CliRunner().invoke(cli, ["deploy", "init", str(folder), "--peers", "2", "--host", "fed.example.org"])

    assert said.exit_code == 0, said.output
    deployment = Deployment.read(folder)
    assert deployment.hosts == ("fed.example.org",)
    parts = {deployment.superlink: deployment.superlink_command()}
    parts |= {deployment.peer(name): deployment.supernode_command(name) for name in deployment.names}
    for part, command in parts.items():
        readme = (part / "README.md").read_text()
        assert shlex.join(command) in " ".join(readme.replace("\\\n", " ").split())
        assert str(tmp_path) not in readme  # it holds wherever the folder lies
    assert "--superlink fed.example.org:9092" in readme
    keys = {(folder / "peers" / name / "node.pub").read_text() for name in deployment.names}
    assert len(keys) == 2
    assert all(key.startswith("ecdsa-sha2-nistp384 ") for key in keys)
    own = tomllib.loads((folder / "peers" / "peer-1" / "peer.toml").read_text())
    assert (own["name"], own["partition-id"], own["num-partitions"]) == ("peer-1", 1, 2)
    trusted = read_trusted(folder / "peers" / "peer-1" / own["trusted-keys"])
    publics = {name: (folder / "peers" / name / "node.pub").read_text().strip() for name in deployment.names}
    assert trusted == publics
    assert Identity(folder / "peers" / "peer-1" / own["identity"]).public == publics["peer-1"]


def test_the_certificate_is_the_authoritys_and_names_its_hosts(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(deployment.authority)]
    server = str(deployment.superlink / "server.pem")
    assert subprocess.run([*verify, "-verify_ip", "127.0.0.1", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_hostname", "localhost", server], check=False).returncode == 0
    assert subprocess.run([*verify, "-verify_ip", "10.0.0.1", server], check=False).returncode != 0
    assert subprocess.run([*verify, "-verify_hostname", "example.org", server], check=False).returncode != 0


def secrets(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*.key")}


def test_a_partys_folder_holds_no_secret_of_another(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    parts = [deployment.superlink, *map(deployment.peer, deployment.names)]

    own = {part: secrets(part) for part in parts}

    assert all(len(found) == 1 for found in own.values())
    assert len(secrets(deployment.folder)) == 1 + len(parts)  # and the authority's
    for part, found in own.items():
        content = {path.read_bytes() for path in part.rglob("*") if path.is_file()}
        assert content & secrets(deployment.folder) == found


def test_the_superlinks_part_is_a_deployment_of_its_own_wherever_it_lies(tmp_path):
    made = new_deployment(tmp_path / "d")
    with trial.flower(made):
        pass
    made.superlink.rename(tmp_path / "other place")
    shutil.rmtree(made.folder)

    moved = Deployment.read(tmp_path / "other place")
    with trial.flower(moved):
        config = tomllib.loads((moved.operator / "config.toml").read_text())

    assert moved.superlink_command() == made.superlink_command()
    assert config["superlink"][CONNECTION]["root-certificates"] == str(tmp_path / "other place" / "ca.crt")
    for path in (moved.authority, *map(moved.public_key, moved.names)):
        assert path.is_relative_to(tmp_path / "other place") and path.exists()
    with pytest.raises(FedkdError, match="is the SuperLink's part"):
        trial.up(moved)


class FakeFlower:
    """Answers registrations: the SuperLink knows some keys already."""

    def __init__(self, *known: Path, refusal: str = "Public key already in use.") -> None:
        self._known, self._refusal = {*map(str, known)}, refusal

    def json(self, *words: str) -> dict:
        key = words[2]
        assert words == ("supernode", "register", key, CONNECTION)
        if key in self._known:
            return {"success": False, "error-message": self._refusal}
        self._known.add(key)
        return {"success": True, "node-id": 1}


def test_a_registration_that_broke_off_goes_on(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    flwr = FakeFlower(deployment.public_key("peer-0"))

    assert trial.register(deployment, flwr) == ["peer-1", "peer-2"]
    assert trial.register(deployment, flwr) == []


def test_a_key_that_flower_refuses_is_named_with_the_reason(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    flwr = FakeFlower(deployment.public_key("peer-1"), refusal="Not a NIST curve.")

    with pytest.raises(LaunchError, match=r"the key of peer-1: Not a NIST curve\."):
        trial.register(deployment, flwr)


@pytest.mark.parametrize(
    "host",
    [
        "fed.example.org:9092", "https://fed.example.org", "bad host", "", "bücher.example", "[::1]", "10.0.0.300",
        "fe80::1%eth0", "0.0.0.0", "-fed.example.org", "fed..org", f"{'x' * 64}.org",
    ],
)  # fmt: skip
def test_a_host_that_nobody_can_dial_is_refused_before_anything_is_written(tmp_path, host):
    said = CliRunner().invoke(cli, ["deploy", "init", str(tmp_path / "d"), "--host", "fed.example.org", "--host", host])

    assert isinstance(said.exception, SettingError)
    assert str(said.exception).startswith("Expected setting `--host` to be an address, or a host name")
    assert repr(host) in str(said.exception)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        (["--fleet-port", "0"], "--fleet-port"),
        (["--control-port", "9092"], "--control-port"),
        (["--node-port", "65535"], "--node-port"),
    ],
)
def test_ports_that_cannot_be_are_refused(tmp_path, wrong, flag):
    said = CliRunner().invoke(cli, ["deploy", "init", str(tmp_path / "d"), *wrong])

    assert isinstance(said.exception, SettingError) and said.exception.key == flag


def test_an_ipv6_address_is_written_as_flower_reads_it(tmp_path):
    deployment = Deployment(tmp_path / "d", ("2001:db8::7", "fed.example.org"), 1, 9092, 9093, 9400)
    create(deployment, demo=False)

    superlink, supernode = deployment.superlink_command(), deployment.supernode_command("peer-0")

    assert superlink[superlink.index("--fleet-api-address") + 1] == "[::]:9092"
    assert supernode[supernode.index("--superlink") + 1] == "[2001:db8::7]:9092"
    verify = ["openssl", "verify", "-CAfile", str(deployment.authority), "-verify_ip", "2001:db8::7"]
    assert subprocess.run([*verify, deployment.superlink / "server.pem"], check=False).returncode == 0


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    deployment = Deployment(tmp_path, ("127.0.0.1",), 1, 9092, 9093, 9400)
    with pytest.raises(SettingError, match="`DIR` to be a new or empty folder"):
        create(deployment, demo=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_where_nothing_listens_says_how_to_start_it(tmp_path):
    deployment = Deployment(tmp_path / "trial", ("127.0.0.1",), 2, free_port(), free_port(), 9400)
    create(deployment, demo=False)

    with pytest.raises(FedkdError, match=f"not up, .*: `fedkd deploy up {deployment.folder}`"):
        trial.require_up(deployment)


def test_no_key_of_a_deployment_is_committed_by_accident(tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    create(Deployment(tmp_path / "trial", ("127.0.0.1",), 2, 9092, 9093, 9400), demo=False)

    found = subprocess.run(["git", "status", "--short"], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert found.stdout == ""


def test_down_ends_only_what_up_started(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as own:
        entries = [
            {"name": "a", "pid": own.pid, "started": psutil.Process(own.pid).create_time()},
            {"name": "b", "pid": other.pid, "started": 0.0},  # the number of a process that ended long ago
        ]
        deployment.trial.mkdir()
        (deployment.trial / "processes.json").write_text(json.dumps(entries))

        assert trial.down(deployment) == ["a"]

        assert own.wait(10) != 0
        assert other.poll() is None
        other.kill()


def test_a_unit_runs_its_partys_command(tmp_path):
    deployment = new_deployment(tmp_path / "d")

    for unit in deployment.folder.rglob("*.service"):
        text = unit.read_text()
        assert "{" not in text and "\nExecStart=/opt/fedkd/bin/flower-super" in text


def compose(part: Path) -> dict:
    import yaml

    services = yaml.safe_load((part / "compose.yaml").read_text())["services"]
    (service,) = services.values()
    return service


def test_a_container_runs_its_partys_command_in_its_folder(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    parts = {deployment.superlink: deployment.superlink_command()}
    parts |= {deployment.peer(name): deployment.supernode_command(name) for name in deployment.names}

    found = {part: compose(part) for part in parts}

    for part, command in parts.items():
        assert found[part]["command"] == command
        assert found[part]["volumes"][0] == f".:{found[part]['working_dir']}"
        assert found[part]["environment"]["FLWR_HOME"].startswith(found[part]["working_dir"])
        assert "FEDKD_USER=" in (part / "README.md").read_text() and "${FEDKD_USER:?" in found[part]["user"]


def test_of_containers_the_superlinks_fleet_port_alone_can_be_reached_and_a_peers_code_not_be_written(tmp_path):
    deployment = new_deployment(tmp_path / "d")
    port, peers = deployment.fleet_port, [compose(deployment.peer(name)) for name in deployment.names]

    assert compose(deployment.superlink)["ports"] == [f"{port}:{port}"]
    assert not any("ports" in peer for peer in peers)
    for peer in peers:
        (code,) = (volume for volume in peer["volumes"] if isinstance(volume, dict))
        assert code["target"] == "/site/home/apps" and code["read_only"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("party", ["superlink", "peers/peer-1"])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path, party):
    deployment = new_deployment(tmp_path / "d")
    (unit,) = (deployment.folder / party).glob("*.service")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("flower-superlink", "flower-supernode"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace("/opt/fedkd/bin/flower", f"{programs}/flower"))

    said = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True, check=False)

    assert said.returncode == 0
    assert [line for line in (said.stdout + said.stderr).splitlines() if unit.name in line] == []
