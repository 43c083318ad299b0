"""What a deployment is and where its files lie; the exact commands that Flower is given."""

import ipaddress
import json
import re
import shlex
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError, SettingError

CONNECTION = "fedkd"
_FILE = "deployment.toml"
_LABEL = re.compile("(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Deployment:
    """A federation of one SuperLink and some sites.

    Attributes:
        folder: where its files lie; a site gets its own part of it only, and the SuperLink's machine its own.
        hosts: names and addresses of the SuperLink, the first being the one that sites use.
        peers: how many sites.
        fleet_port: where SuperNodes reach the SuperLink.
        control_port: where `flwr run` reaches it, from its own machine only.
        node_port: of a SuperNode's own local interface; on one machine, of the first of them.
        alone: the folder is the SuperLink's part, and the peers' are elsewhere.
    """

    folder: Path
    hosts: tuple[str, ...]
    peers: int
    fleet_port: int
    control_port: int
    node_port: int
    alone: bool = False

    def __post_init__(self) -> None:
        if self.peers < 1:
            raise SettingError("--peers", self.peers, "a number >= 1")
        for host in self.hosts or ("",):
            if not _can_be_dialled(host):
                raise SettingError("--host", host, "an address, or a host name in ASCII, without a port or brackets")
        for flag, port in (("--fleet-port", self.fleet_port), ("--control-port", self.control_port)):
            if not 1 <= port <= 65535:
                raise SettingError(flag, port, "a port from 1 to 65535")
        if self.control_port == self.fleet_port:
            raise SettingError("--control-port", self.control_port, "another port than --fleet-port")
        if not 1 <= self.node_port <= 65536 - self.peers:
            raise SettingError("--node-port", self.node_port, "a port, with one for every peer from there to 65535")

    @classmethod
    def read(cls, folder: Path) -> "Deployment":
        """Read a deployment from its folder, or from the SuperLink's part of it, wherever that lies.

        Raises:
            FedkdError: there is none.
        """
        place = folder.expanduser().absolute()
        alone = (place / _FILE).exists()
        try:
            text = (place / _FILE if alone else place / "superlink" / _FILE).read_text(encoding="utf-8")
            found: dict[str, Any] = tomllib.loads(text)
            hosts = tuple(found.pop("hosts"))
            return cls(place, hosts, **found, alone=alone)
        except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise FedkdError(f"Expected a deployment made by `fedkd deploy init` in {place} ({error}).") from error

    def write(self) -> None:
        """Write what :meth:`read` reads."""
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "alone")}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (self.superlink / _FILE).write_text(text, encoding="utf-8")

    @property
    def names(self) -> list[str]:
        """The peers' names."""
        return [f"peer-{i}" for i in range(self.peers)]

    @property
    def authority(self) -> Path:
        """The certificate by which the SuperLink is recognised."""
        return self.superlink / "ca.crt"

    @property
    def superlink(self) -> Path:
        """The SuperLink's part: the folder that is copied to its machine."""
        return self.folder if self.alone else self.folder / "superlink"

    @property
    def operator(self) -> Path:
        """The `FLWR_HOME` of whoever starts runs."""
        return self.superlink / "operator"

    @property
    def trial(self) -> Path:
        """Logs and process numbers of a trial on one machine."""
        return self.folder / "trial"

    def peer(self, name: str) -> Path:
        """One site's part: the folder that is copied to it."""
        return self.folder / "peers" / name

    def public_key(self, name: str) -> Path:
        """The key by which the SuperLink knows a peer."""
        return self.superlink / "nodes" / f"{name}.pub"

    def flower_config(self) -> str:
        """Return the config.toml that tells `flwr` where this SuperLink is, and its certificate: an absolute path."""
        certificate = json.dumps(str(self.authority), ensure_ascii=False)
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.control_port}"\nroot-certificates = {certificate}\n'
        )

    def superlink_command(self, *, bind: str | None = None) -> list[str]:
        """Return the SuperLink's command, to be run in its folder.

        Args:
            bind: the address on which SuperNodes may reach it, None: every one that it has; runs are started from the
                same machine only.
        """
        everywhere = "::" if any(":" in host for host in self.hosts) else "0.0.0.0"
        return [
            "flower-superlink",
            "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt",
            "--host", "127.0.0.1", "--port", str(self.control_port),
            "--fleet-api-type", "grpc-rere", "--fleet-api-address", _endpoint(bind or everywhere, self.fleet_port),
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
            "--superlink", _endpoint(host or self.hosts[0], self.fleet_port), "--root-certificates", "ca.crt",
            "--auth-supernode-private-key", "node.key",
            "--host", "127.0.0.1", "--port", str(port or self.node_port),
            "--node-config", 'peer-config="peer.toml"',
        ]  # fmt: skip


def shell(command: list[str]) -> str:
    """Return a command as a shell takes it, an option and its value a line."""
    text = shlex.join(command)
    return text.replace(" --", " \\\n    --")


def _endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _can_be_dialled(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        return len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return not address.is_unspecified and "%" not in host  # a certificate has no place for the zone of an address
