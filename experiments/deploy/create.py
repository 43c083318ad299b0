"""`fedkd deploy init`: writes everything a federation needs, one folder per party.

A party's folder holds all that it needs, its own commands included, and no secret of another: it is handed over as it
is, and may lie anywhere.
"""

import json

from cryptography.hazmat.primitives.serialization import Encoding

from experiments.deploy import units
from experiments.deploy.demo import MODELS, write_demo_data
from experiments.deploy.keys import Authority, node_key, private_pem, write_secret
from experiments.deploy.layout import Deployment, shell
from fedkd.errors import SettingError

_LOCAL = ("127.0.0.1", "localhost")

_SEALED = """\
# Sealed runs alone: there the trusted keys prove who sent what, and the SuperLink reads nothing. With false, plain runs
# too, in which no key matters: whoever carries the mail could then ask for one.
require-sealed = true
"""
_SEALED_IN_A_TRIAL = """\
# A trial of `init --demo`: plain runs too, in which no key matters. A real site says true, or leaves this line out.
require-sealed = false
"""


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
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # keys in somebody's clone
    _write_keys(deployment)
    deployment.write()
    for index, name in enumerate(deployment.names):
        write_secret(deployment.peer(name) / "peer.toml", _peer_toml(deployment, index, demo=demo).encode())
    if demo:
        write_demo_data([deployment.peer(name) for name in deployment.names])
    units.write(deployment)
    (folder / "README.md").write_text(_readme(deployment), encoding="utf-8")
    (deployment.superlink / "README.md").write_text(_superlink_readme(deployment), encoding="utf-8")
    for name in deployment.names:
        (deployment.peer(name) / "README.md").write_text(_peer_readme(deployment, name), encoding="utf-8")


def _write_keys(deployment: Deployment) -> None:
    authority = Authority.new()
    certificate = authority.certificate.public_bytes(Encoding.PEM)
    write_secret(deployment.folder / "ca.key", private_pem(authority.key))
    write_secret(deployment.folder / "ca.crt", certificate)
    server, key = authority.server(tuple(dict.fromkeys((*deployment.hosts, *_LOCAL))))
    for name, content in (("server.pem", server), ("server.key", key), ("ca.crt", certificate)):
        write_secret(deployment.superlink / name, content)
    pairs = {name: node_key() for name in deployment.names}
    trusted = b"".join(f"{name} ".encode() + public for name, (_, public) in pairs.items())
    for name, (private, public) in pairs.items():
        write_secret(deployment.public_key(name), public)
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
    sealed = _SEALED_IN_A_TRIAL if demo else _SEALED
    return f"""\
# This peer's own configuration. The server cannot change it and never names a file that is opened here.
# Relative paths start at this file's folder.
name = {json.dumps(deployment.names[index])}
partition-id = {index}               # its number, another for every peer
num-partitions = {deployment.peers}             # how many peers there are

model = {json.dumps(model)}                # resnet20, timm:resnet18@a1_in1k, hf:FOLDER, package.module:factory ...
checkpoint = ""             # .safetensors, or a file of torch.save; empty: trained from scratch
replace-head = false        # true: a new head where the checkpoint's is for other classes
held-out = ""               # file of the indices of training samples that the checkpoint has not seen; empty: not known
input-size = ""             # pixels at which the model sees images; empty: as its own description says, if it has one
train = ""                  # all, head (on features computed once) or last:N; empty: all
dataset = {json.dumps(dataset)}              # npz:PATH, folder:PATH, parquet:PATH, hf:PATH or package.module:function
proxy = {json.dumps(proxy)}                # the public proxy set, the same at all peers, without labels if need be
state-dir = "state"
device = "auto"             # auto, cpu, cuda, cuda:N

# Sealed mail: this peer signs its keys with its own, and believes only those that the trusted ones have signed.
identity = "node.key"
trusted-keys = "trusted-keys"   # a line NAME TYPE BASE64 a peer, as in the peers' node.pub; get them from the peers

# What the server may ask for. A run that asks for more is refused with the limit's name.
allowed-strategies = "averaged,pairwise,gossip"
{sealed}tell = ""                   # beside logits: any of counts, density, mask (docs/security.md: what it tells)
max-epochs = 200            # in one message, of all it asks for together
max-payload = {256 * 2**20}     # bytes in one message
max-batch-size = 1024       # samples in a training step; less where the model or the images are large
max-seconds = 86400.0       # for one message; to be taken out with `worker = false`, where nothing could hold it
# max-epsilon = 8.0         # demands differential privacy: the most that all it ever publishes may amount to, with
# max-delta = 1e-5          # this; what it measures then stays in its own measured.jsonl (docs/security.md)
"""


def _readme(deployment: Deployment) -> str:
    return f"""\
# A fedkd deployment

A SuperLink ({", ".join(deployment.hosts)}) and {deployment.peers} peers. `docs/deploy.md` explains it.

- `superlink/` goes to the SuperLink's machine. It holds its own secrets, and of the peers what is public.
- `peers/NAME/` goes to that peer's machine and nowhere else: its `node.key` proves who the peer is. Keep no copy here.
- `ca.key`, with `ca.crt`, makes certificates that every peer believes: keep it offline.

The README.md in each of these folders has its commands. They hold wherever the folder lies.

## A trial, with all of them on this machine

In this folder, once every `peer.toml` names a model and data (`init --demo` has done that):

```sh
fedkd deploy up .
fedkd deploy run . rounds=3 strategy=gossip sealed=true
fedkd deploy down .
```
"""


def _superlink_readme(deployment: Deployment) -> str:
    return f"""\
# The SuperLink of a fedkd deployment

{deployment.peers} peers reach it as {deployment.hosts[0]}, port {deployment.fleet_port}.
All commands are run in this folder, by its owner.

## Start it

```sh
{_environment()}
{shell(deployment.superlink_command())}
```

`fedkd-superlink.service` does the same under systemd. In a container, and then with `docker compose exec superlink`
ahead of each command below:

{_container()}

## Once: make the peers' keys known

```sh
fedkd deploy register .
```

They are the files of `nodes/`. A peer that makes a key of its own, now or later, sends the public one: put it in the
place of its `nodes/NAME.pub`, and register again.

## A run

```sh
fedkd deploy status .
fedkd deploy run . rounds=10 strategy=gossip sealed=true
```

The results go to `runs/` here; an `out-dir` elsewhere has to be open to the SuperLink, which writes them. With Flower
alone, once a command above has run, and with FEDKD the folder of the Flower app (`fedkd doctor` names it); its exit
status is 0 even when the run failed:

```sh
FLWR_HOME="$PWD/operator" flwr run FEDKD fedkd --stream --run-config \\
    "peers={deployment.peers} controls='isolated' out-dir='$PWD/runs/first'"
```
"""


def _peer_readme(deployment: Deployment, name: str) -> str:
    return f"""\
# {name}, a peer of a fedkd deployment

Fill in `peer.toml`. All commands are run in this folder, by its owner, and in one shell:

```sh
{_environment()}
```

## Pin the code

A run brings its code along; a peer that installed its own runs that or nothing. With FEDKD the folder of the Flower app
(`fedkd doctor` names it) as you have checked it:

```sh
flwr build --app FEDKD
flwr install fedkd.fedkd.*.fab
rm fedkd.fedkd.*.fab
chmod -R a-w home/apps
```

Every new version has to be installed, too, after `chmod -R u+w home/apps`.

## Start the SuperNode

```sh
{shell(deployment.supernode_command(name))}
```

`fedkd-supernode.service` does the same under systemd, and starts it again when it ends. In a container:

{_container()}
"""


def _environment() -> str:
    settings = {**units.ENVIRONMENT, "FLWR_HOME": '"$PWD/home"'}
    return "\n".join(["umask 077", *(f"export {key}={value}" for key, value in settings.items())])


def _container() -> str:
    return """\
```sh
echo "FEDKD_USER=$(id -u):$(id -g)" > .env     # who owns this folder
docker compose up -d
```"""
