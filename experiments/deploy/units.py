"""A systemd unit and a compose file for each of a deployment's parties."""

from experiments.deploy.layout import Deployment

ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
}

_FOLDER, _PROGRAMS = "/var/lib/fedkd/site", "/opt/fedkd/bin"

_UNIT = """\
# Expects fedkd in {programs}/.. (python3 -m venv, pip install), and this party's folder as {folder},
# owned by the user `fedkd`.
[Unit]
Description=fedkd {what}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=fedkd
WorkingDirectory={folder}
{environment}
ExecStart={command}
Restart=always
RestartSec=15
KillMode=control-group
UMask=0077
StateDirectory=fedkd
StateDirectoryMode=0700
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=
LockPersonality=yes
{more}
[Install]
WantedBy=multi-user.target
"""

_PINNED = f"""\
# Only code that is installed here can run; without this line, whatever the SuperLink sends (docs/security.md).
ReadOnlyPaths={_FOLDER}/home/apps
"""

_SERVICE = """\
# Expects an image with Python and fedkd, e.g. `FROM python:3.12-slim` and `RUN pip install fedkd`. README.md says how
# to start it. A container reaches no other one as 127.0.0.1: on one machine, too, the first `--host` of `fedkd deploy
# init` has to be a name or an address of that machine.
services:
  {name}:
    image: fedkd
    restart: always
    init: true
    user: '${{FEDKD_USER:?is not set, see README.md}}'
    working_dir: /site
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ['no-new-privileges:true']
    environment:
{environment}
    command:
{command}
    volumes:
      - .:/site
{more}"""

_PINNED_VOLUME = """\
      - type: bind  # only code that is installed here can run; without this, whatever the SuperLink sends
        source: ./home/apps
        target: /site/home/apps
        read_only: true
        bind: {create_host_path: false}
"""


def write(deployment: Deployment) -> None:
    """Write a unit and a `compose.yaml` into every party's folder."""
    unit = _unit("SuperLink", deployment.superlink_command())
    (deployment.superlink / "fedkd-superlink.service").write_text(unit, encoding="utf-8")
    # Docker brings what arrives at the machine's port, by whichever protocol, to this one of the container.
    service = _compose("superlink", deployment.superlink_command(bind="0.0.0.0"), _published(deployment.fleet_port))
    (deployment.superlink / "compose.yaml").write_text(service, encoding="utf-8")
    for name in deployment.names:
        command = deployment.supernode_command(name)
        unit = _unit(f"SuperNode of {name}", command, more=_PINNED)
        (deployment.peer(name) / "fedkd-supernode.service").write_text(unit, encoding="utf-8")
        (deployment.peer(name) / "compose.yaml").write_text(_compose(name, command, _PINNED_VOLUME), encoding="utf-8")


def _unit(what: str, command: list[str], *, more: str = "") -> str:
    environment = {**ENVIRONMENT, "FLWR_HOME": f"{_FOLDER}/home", "PATH": f"{_PROGRAMS}:/usr/bin:/bin"}
    return _UNIT.format(
        what=what,
        more=more,
        folder=_FOLDER,
        programs=_PROGRAMS,
        environment="\n".join(f"Environment={key}={value}" for key, value in environment.items()),
        command=f"{_PROGRAMS}/" + " ".join(_quoted(word) for word in command),
    )


def _quoted(word: str) -> str:
    return f"'{word}'" if '"' in word else word


def _compose(name: str, command: list[str], more: str) -> str:
    """Return a compose file with one party, for its folder."""
    environment = {**ENVIRONMENT, "FLWR_HOME": "/site/home"}
    return _SERVICE.format(
        name=name,
        more=more,
        environment="\n".join(f"      {key}: '{value}'" for key, value in environment.items()),
        command="\n".join("      - '" + word.replace("'", "''") + "'" for word in command),
    )


def _published(port: int) -> str:
    return f"    ports:\n      - '{port}:{port}'\n"
