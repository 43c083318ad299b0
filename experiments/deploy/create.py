"""`fedkd deploy init`: writes everything a federation needs, one folder per party."""

import json

from cryptography.hazmat.primitives.serialization import Encoding

from experiments.deploy import units
from experiments.deploy.demo import MODELS, write_demo_data
from experiments.deploy.keys import Authority, node_key, private_pem, write_secret
from experiments.deploy.layout import Deployment, shell
from fedkd.errors import SettingError

_LOCAL = ("127.0.0.1", "localhost")


def create(deployment: Deployment, *, demo: bool) -> None:
    """Write a deployment's folder.

    Args:
        deployment: what to write.
        demo: give every peer a model and data for a trial, which its owner would else fill in.

    Raises:
        SettingError: the folder exists and holds something.
    """
    folder = deployment.folder
    if folder.exists() and any(folder.iterdir()):
        raise SettingError("DIR", str(folder), "a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_keys(deployment)
    (folder / "deployment.toml").write_text(deployment.to_toml(), encoding="utf-8")
    deployment.operator.mkdir(mode=0o700)
    (deployment.operator / "config.toml").write_text(deployment.flower_config(), encoding="utf-8")
    for index, name in enumerate(deployment.names):
        write_secret(deployment.peer(name) / "peer.toml", _peer_toml(deployment, index, demo=demo).encode())
    if demo:
        write_demo_data([deployment.peer(name) for name in deployment.names])
    units.write(deployment)
    (folder / "README.md").write_text(_readme(deployment), encoding="utf-8")


def _write_keys(deployment: Deployment) -> None:
    authority = Authority.new()
    certificate = authority.certificate.public_bytes(Encoding.PEM)
    write_secret(deployment.folder / "ca.key", private_pem(authority.key))
    write_secret(deployment.authority, certificate)
    server, key = authority.server(tuple(dict.fromkeys((*deployment.hosts, *_LOCAL))))
    for name, content in (("server.pem", server), ("server.key", key), ("ca.crt", certificate)):
        write_secret(deployment.superlink / name, content)
    pairs = {name: node_key() for name in deployment.names}
    trusted = b"".join(f"{name} ".encode() + public for name, (_, public) in pairs.items())
    for name, (private, public) in pairs.items():
        for file, content in (
            ("node.key", private),
            ("node.pub", public),
            ("ca.crt", certificate),
            ("trusted-keys", trusted),
        ):
            write_secret(deployment.peer(name) / file, content)


def _peer_toml(deployment: Deployment, index: int, *, demo: bool) -> str:
    model = MODELS[index % len(MODELS)] if demo else ""
    dataset, proxy = ("npz:data.npz", "npz:proxy.npz") if demo else ("", "")
    return f"""\
# This peer's own configuration. The server cannot change it and never names a file that is opened here.
# Relative paths start at this file's folder.
name = {json.dumps(deployment.names[index])}
partition-id = {index}               # its number, another for every peer
num-partitions = {deployment.peers}             # how many peers there are

model = {json.dumps(model)}                # a name such as resnet20, or package.module:factory
checkpoint = ""             # .safetensors, or a state dict of torch.save; empty: trained from scratch
dataset = {json.dumps(dataset)}              # npz:PATH, folder:PATH or package.module:function
proxy = {json.dumps(proxy)}                # the public proxy set, the same at all peers; its fingerprint is compared
state-dir = "state"
device = "auto"             # auto, cpu, cuda, cuda:N

# Sealed mail: this peer signs its keys with its own, and believes only those that the trusted ones have signed.
identity = "node.key"
trusted-keys = "trusted-keys"   # a line NAME TYPE BASE64 a peer, as in the peers' node.pub; get them from the peers

# What the server may ask for. A run that asks for more is refused with the limit's name.
allowed-strategies = "averaged,pairwise,gossip"
require-sealed = false      # true: only runs whose knowledge the SuperLink cannot read
max-epochs = 200            # in one message
max-payload = {256 * 2**20}     # bytes in one message
max-seconds = 86400.0       # for one message
# max-epsilon = 8.0         # demands differential privacy: the most that all it ever publishes may amount to, with
# max-delta = 1e-5          # this; what it measures then stays in its own measured.jsonl (docs/security.md)
"""


def _readme(deployment: Deployment) -> str:
    lines = [
        "# A fedkd deployment",
        "",
        f"A SuperLink ({', '.join(deployment.hosts)}) and {deployment.peers} peers. `docs/deploy.md` explains it.",
        "",
        "- `superlink/` goes to the SuperLink's machine, `peers/NAME/` to that peer's machine and nowhere else.",
        "- `ca.key` makes certificates that every peer believes: keep it offline.",
        "- Each peer's owner fills in `peers/NAME/peer.toml`.",
        "",
        "## SuperLink, in `superlink/`",
        "",
        "```sh",
        _environment(),
        shell(deployment.superlink_command()),
        "```",
        "",
        "## Once: make the peers' keys known, on the SuperLink's machine",
        "",
        "```sh",
        f"export FLWR_HOME={deployment.operator}",
        *(" ".join(deployment.register_command(name)) for name in deployment.names),
        "```",
        "",
    ]
    lines += [
        "## At every peer: pin the code",
        "",
        "A run brings its code along; a peer that installed its own runs that or nothing. In its folder,",
        "with FEDKD the folder of the Flower app (`fedkd doctor` names it) as its owner has checked it, and again with",
        "every new version:",
        "",
        "```sh",
        "flwr build --app FEDKD",
        'FLWR_HOME="$PWD/home" flwr install fedkd.fedkd.*.fab',
        "chmod -R a-w home/apps",
        "```",
        "",
    ]
    for name in deployment.names:
        lines += [
            f"## {name}, in `peers/{name}/`", "", "```sh", _environment(),
            shell(deployment.supernode_command(name)), "```", "",
        ]  # fmt: skip
    lines += [
        "## A run, on the SuperLink's machine",
        "",
        "```sh",
        f"fedkd deploy run {deployment.folder} rounds=10 strategy=gossip sealed=true",
        "```",
        "",
        "or with Flower alone, from the fedkd repository (its exit status is 0 even when the run failed):",
        "",
        "```sh",
        f"FLWR_HOME={deployment.operator} flwr run . fedkd --stream --run-config "
        f"""'peers={deployment.peers} controls="isolated" out-dir="/absolute/path"'""",
        "```",
        "",
    ]
    return "\n".join(lines)


def _environment() -> str:
    settings = {**units.ENVIRONMENT, "FLWR_HOME": '"$PWD/home"'}
    return "\n".join(f"export {key}={value}" for key, value in settings.items())
