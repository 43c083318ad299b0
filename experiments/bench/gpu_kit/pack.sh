#!/usr/bin/env bash
# Builds .gpu/ in the project's root, for a GPU machine that has torch and no network: `bash experiments/gpu_kit/pack.sh`.
# DATA=FOLDER has cifar10.npz and pretrained/cifar10_resnet{20,32}.pt for part r; MAX_MIB=55 is what it may weigh;
# STRIP=0 leaves symbols in Ray's binaries.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(git rev-parse --show-toplevel)
cd "$root"
max=${MAX_MIB:-55}
python=
for candidate in python3 python3.11 python3.12 python3.13; do
  if "$candidate" -m pip --version >/dev/null 2>&1; then python=$candidate; break; fi
done
[ -n "$python" ] || { echo "error: no python3 with pip (an environment made by uv has none: deactivate it)" >&2; exit 2; }

exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")" .gpu
grep -qxF '/.gpu/' "$exclude" 2>/dev/null || echo '/.gpu/' >>"$exclude"
install -m 644 "$here"/{unpack.sh,check.sh,judge.py} .gpu/
git describe --always --dirty=+ --abbrev=40 --exclude='*' >.gpu/commit

stamp=$(cat "$here/carried.txt" "$here/on-device.txt" "$here/pack.sh" pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -f .gpu/site.tar.xz ] && [ "$(cat .gpu/site.stamp 2>/dev/null)" = "$stamp" ]; then
  echo "packages: as packed before"
else
  rm -f .gpu/site.tar.xz .gpu/site.stamp
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  mkdir "$scratch/wheels" "$scratch/site"
  platforms=()
  for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 \
    manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  echo "packages: downloading"
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$scratch/wheels" --requirement "$here/carried.txt" 2> >(grep -v 'is ignored: it is neither' >&2)
  "$python" - "$scratch" "$here/on-device.txt" pyproject.toml <<'PY'
"""Check that nothing is missing, then unpack the wheels without what no simulation needs."""
import re
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

scratch, listed, project = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
WAIVED = {"uv"}  # Flower calls it to install an app's dependencies, which fedkd's launcher turns off
LEFT_OUT = re.compile(
    r"""^ray/(jars|rllib|serve|llm|tune|train|data|workflow|cpp|dashboard/client|core/libjemalloc\.so
          |core/generated/ray/serve|_private/thirdparty/pynvml/tests)(/|$)
      |(^|/)(tests?|SelfTest|testing/suite)/
      |^datasets/packaged_modules/.*/test_
      |\.(c|cc|cpp|h|hpp|pxd|pxi|pyx|pyi|map|jar|a)$""",
    re.VERBOSE,
)
ENVIRONMENT = {
    "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "platform_system": "Linux",
    "platform_machine": "x86_64", "os_name": "posix", "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(requirement, extras):
    return requirement.marker is None or any(
        requirement.marker.evaluate({**ENVIRONMENT, "extra": extra}) for extra in extras
    )


device = {plain(line) for line in listed.read_text().split()}
wheels, needs = {}, {}
for path in sorted((scratch / "wheels").glob("*.whl")):
    with zipfile.ZipFile(path) as wheel:
        metadata = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        said = HeaderParser().parsestr(wheel.read(metadata).decode())
    wheels[plain(said["Name"])] = (path, said["Version"])
    extras = ("", "simulation") if plain(said["Name"]) == "flwr" else ("",)
    needs[said["Name"]] = [r for r in map(Requirement, said.get_all("Requires-Dist") or []) if applies(r, extras)]
needs["the project"] = [Requirement(text) for text in tomllib.loads(project.read_text())["project"]["dependencies"]]
wrong = []
for who, requirements in needs.items():
    for requirement in requirements:
        name = plain(requirement.name)
        if name in wheels:
            version = wheels[name][1]
            if not requirement.specifier.contains(version, prereleases=True):
                print(f"  note: {who} wants {requirement}, {version} travels")
        elif name not in device | WAIVED:
            wrong.append(f"{who} needs {requirement}: it is not on the machine and does not travel (carried.txt)")
if wrong:
    sys.exit("error: " + "\nerror: ".join(wrong))
kept = 0
for path, _ in wheels.values():
    with zipfile.ZipFile(path) as wheel:
        for entry in wheel.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
            if entry.is_dir() or LEFT_OUT.search(name) or re.match(r"^[^/]+\.data/", name):
                continue
            target = scratch / "site" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(entry))
            target.chmod((entry.external_attr >> 16) & 0o777 | 0o600)
            kept += entry.file_size
print(f"packages: {len(wheels)} wheels, {kept / 2**20:.0f} MiB unpacked")
PY
  if [ "${STRIP:-1}" = 1 ] && command -v strip >/dev/null; then
    for binary in _raylet.so core/src/ray/raylet/raylet core/src/ray/gcs/gcs_server; do
      strip --strip-unneeded "$scratch/site/ray/$binary"
    done
  fi
  echo "packages: packing (a minute or more)"
  tar -C "$scratch/site" --sort=name --owner=0 --group=0 -cf - . | nice -n 5 xz -6 -T0 >.gpu/site.tar.xz
  echo "$stamp" >.gpu/site.stamp
fi

# A slice of real images and two real checkpoints, if there are any and room is left.
data=${DATA:-}
if [ -n "$data" ] && [ -f "$data/cifar10.npz" ] && [ ! -f .gpu/data/cifar10.npz ]; then
  mkdir -p .gpu/data
  "$python" - "$data/cifar10.npz" .gpu/data/cifar10.npz "${IMAGES:-5000}" <<'PY' || echo "real data: none (numpy is needed to cut it)"
import sys

import numpy as np

source, target, count = np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
stream, found = np.random.default_rng(0), {}
for part, wanted in (("train", count), ("test", count // 5)):
    chosen = np.sort(stream.permutation(len(source[f"y_{part}"]))[:wanted])
    found |= {f"{key}_{part}": source[f"{key}_{part}"][chosen] for key in "xy"}
np.savez_compressed(target, **found)
PY
  for name in cifar10_resnet20.pt cifar10_resnet32.pt; do
    [ -f "$data/pretrained/$name" ] && cp "$data/pretrained/$name" .gpu/data/ && chmod u+w ".gpu/data/$name"
  done
fi
kib() { du -sk --apparent-size "$@" | awk '{sum += $1} END {print sum}'; }
if [ -d .gpu/data ] && [ "$(kib .gpu)" -gt $((max * 1024)) ]; then
  echo "real data: left out, $(kib .gpu/data) KiB are too many"
  rm -rf .gpu/data
fi

mib() { awk -v k="$1" 'BEGIN {printf "%.1f MiB", k / 1024}'; }
tree=$({ git ls-files -z -co --exclude-standard | xargs -0 du -k --apparent-size 2>/dev/null || true; } | awk '{sum += $1} END {print sum + 0}')
size=$(kib .gpu)
echo ".gpu/: $(mib "$size") (packages $(mib "$(kib .gpu/site.tar.xz)"), data $(mib "$(kib .gpu/data 2>/dev/null || echo 0)")); the working tree beside it: $(mib "$tree")"
if [ "$size" -gt $((max * 1024)) ]; then
  echo "error: too much: .gpu/ may have $max MiB (MAX_MIB)" >&2
  exit 1
fi
echo "now, on that machine, in the project's root: bash .gpu/check.sh; it says what else"
