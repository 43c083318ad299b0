"""What a deployment is and where its files lie; the exact commands that Flower is given."""

import json
import shlex
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError, SettingError

CONNECTION = "fedkd"


@dataclass(frozen=True)
class Deployment:
    """A federation of one SuperLink and some sites.

    Attributes:
        folder: where all its files lie; a site gets its own part of it only.
        hosts: names and addresses of the SuperLink, the first being the one that sites use.
        peers: how many sites.
        fleet_port: where SuperNodes reach the SuperLink.
        control_port: where `flwr run` reaches it, from its own machine only.
        node_port: of a SuperNode's own local interface; on one machine, of the first of them.
    """

    folder: Path
    hosts: tuple[str, ...]
    peers: int
    fleet_port: int
    control_port: int
    node_port: int

    def __post_init__(self) -> None:
        if self.peers < 1:
            raise SettingError("--peers", self.peers, "a number >= 1")
        if not self.hosts or not all(host.strip() and "/" not in host for host in self.hosts):
            raise SettingError("--host", ",".join(self.hosts), "a host name or an address")
        for flag, port in (("--fleet-port", self.fleet_port), ("--control-port", self.control_port)):
            if not 1 <= port <= 65535:
                raise SettingError(flag, port, "a port from 1 to 65535")

    @classmethod
    def read(cls, folder: Path) -> "Deployment":
        """Read a deployment from its folder.

        Raises:
            FedkdError: there is none.
        """
        path = folder.expanduser().absolute() / "deployment.toml"
        try:
            found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            hosts = tuple(found.pop("hosts"))
            return cls(path.parent, hosts, **found)
        except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise FedkdError(
                f"Expected a deployment made by `fedkd deploy init` in {path.parent} ({error})."
            ) from error

    def to_toml(self) -> str:
        """Return what :meth:`read` reads."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())

    @property
    def names(self) -> list[str]:
        """The peers' names."""
        return [f"peer-{i}" for i in range(self.peers)]

    @property
    def authority(self) -> Path:
        """The certificate by which the SuperLink is recognised; its key lies beside it."""
        return self.folder / "ca.crt"

    @property
    def superlink(self) -> Path:
        """The SuperLink's part."""
        return self.folder / "superlink"

    @property
    def operator(self) -> Path:
        """The `FLWR_HOME` of whoever starts runs."""
        return self.folder / "operator"

    @property
    def trial(self) -> Path:
        """Logs and process numbers of a trial on one machine."""
        return self.folder / "trial"

    def peer(self, name: str) -> Path:
        """One site's part: the folder that is copied to it."""
        return self.folder / "peers" / name

    def flower_config(self) -> str:
        """Return the config.toml that tells `flwr` where this SuperLink is."""
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.control_port}"\nroot-certificates = {json.dumps(str(self.authority))}\n'
        )

    def superlink_command(self, *, bind: str = "0.0.0.0") -> list[str]:
        """Return the SuperLink's command, to be run in its folder.

        Args:
            bind: the address on which SuperNodes may reach it; runs are started from the same machine only.
        """
        return [
            "flower-superlink",
            "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt",
            "--host", "127.0.0.1", "--port", str(self.control_port),
            "--fleet-api-type", "grpc-rere", "--fleet-api-address", f"{bind}:{self.fleet_port}",
            "--enable-supernode-auth", "--database", "state.db", "--disable-runtime-dependency-installation",
        ]  # fmt: skip

    def supernode_command(self, name: str, *, host: str | None = None, port: int | None = None) -> list[str]:
        """Return a SuperNode's command, to be run in its peer's folder.

        Args:
            name: the peer's.
            host: the SuperLink's; None: the first of its names.
            port: of the SuperNode's own local interface; None: the deployment's.
        """
        return [
            "flower-supernode", "--grpc-rere",
            "--superlink", f"{host or self.hosts[0]}:{self.fleet_port}", "--root-certificates", "ca.crt",
            "--auth-supernode-private-key", "node.key",
            "--host", "127.0.0.1", "--port", str(port or self.node_port),
            "--node-config", 'peer-config="peer.toml"',
        ]  # fmt: skip

    def register_command(self, name: str) -> list[str]:
        """Return the command that makes a peer's key known to the SuperLink."""
        return ["flwr", "supernode", "register", str(self.peer(name) / "node.pub"), CONNECTION]


def shell(command: list[str]) -> str:
    """Return a command as a shell takes it, an option and its value a line."""
    text = shlex.join(command)
    return text.replace(" --", " \\\n    --")
