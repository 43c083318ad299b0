"""systemd units and a compose file for a deployment's parties."""

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


def write(deployment: Deployment) -> None:
    """Write `fedkd-superlink.service` and `fedkd-supernode.service` for every peer, and `compose.yaml`."""
    unit = _unit("SuperLink", deployment.superlink_command())
    (deployment.superlink / "fedkd-superlink.service").write_text(unit, encoding="utf-8")
    for name in deployment.names:
        unit = _unit(f"SuperNode of {name}", deployment.supernode_command(name), more=_PINNED)
        (deployment.peer(name) / "fedkd-supernode.service").write_text(unit, encoding="utf-8")
    (deployment.folder / "compose.yaml").write_text(_compose(deployment), encoding="utf-8")


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


def _compose(deployment: Deployment) -> str:
    """Return a compose file with all parties on one machine; a real site keeps its own service of it."""
    services = [
        _service("superlink", "./superlink", deployment.superlink_command(), ports=[deployment.fleet_port]),
        *(
            _service(name, f"./peers/{name}", deployment.supernode_command(name, host="superlink"), pinned=True)
            for name in deployment.names
        ),
    ]
    head = (
        "# The image needs Python with fedkd installed, e.g. `FROM python:3.12-slim` and `RUN pip install fedkd`.\n"
        "# On one machine add `superlink` to the certificate: `fedkd deploy init --host superlink`.\n"
    )
    return head + "services:\n" + "".join(services)


def _service(
    name: str, folder: str, command: list[str], *, ports: list[int] | None = None, pinned: bool = False
) -> str:
    volumes = [f"{folder}:/site", *([f"{folder}/home/apps:/site/home/apps:ro"] if pinned else [])]
    lines = [
        f"  {name}:",
        "    image: fedkd",
        "    restart: always",
        "    init: true",
        "    user: '${UID:-1000}:${GID:-1000}'  # whoever owns the folders",
        "    working_dir: /site",
        "    read_only: true",
        "    tmpfs: [/tmp]",
        f"    volumes: {volumes}",
        "    cap_drop: [ALL]",
        "    security_opt: ['no-new-privileges:true']",
        "    environment:",
        *(f"      {key}: '{value}'" for key, value in {**ENVIRONMENT, "FLWR_HOME": "/site/home"}.items()),
        "    command:",
        *("      - '" + word.replace("'", "''") + "'" for word in command),
    ]
    if ports:
        lines += ["    ports:", *(f"      - '{port}:{port}'" for port in ports)]
    return "\n".join(lines) + "\n"
