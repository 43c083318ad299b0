#!/usr/bin/env bash
# On the GPU machine, in the project's root: bash .gpu/check.sh [SECONDS [PARTS]], by default `530 abcderfg`.
#   a machine and versions    b fedkd doctor --ray          c the default job on the GPU, beside it on the CPU
#   d the same seed again: the same job, and with one actor  e fast = true, compiled = true
#   r real checkpoints on CIFAR-10, GPU and CPU              f bench gpu, the telling rows first, in the time that is left
#   g GPU memory with 1, 2, 4, 8 actors, out of f            k bench gpu, compiled rows
#   t the quick tests, on a machine with a GPU               (k and t only when asked for)
# Each part has its own limit, a failure stops no other, and a line for each ends the output. All is under $OUT.
# DRY=1: everything on a CPU at a tiny size, to try the script itself where there is no GPU.
budget=${1:-530} parts=${2:-abcderfg}
out=${OUT:-$(mktemp -d "${TMPDIR:-/tmp}/gpu-out-XXXX")}
kit=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check-XXXX")
export out kit work DRY=${DRY:-}
mkdir -p "$out" "$work/runs"
exec 3>&1 4>&2 > >(tee -a "$out/all.log") 2>&1
tee_pid=$!

. "$kit/unpack.sh" || { echo "unpack.sh failed"; exit 1; }

gpu() { # SHARE: the options of a run on the GPU; Ray is told of it only where it does not find it by itself
  if [ "$DRY" ]; then echo "--actors 2"; else echo "--gpus-per-peer $1 $(cat "$work/gpus" 2>/dev/null)"; fi
}
small() { if [ "$DRY" ]; then echo "rounds=1 pretrain-epochs=1"; fi; }
verdict() { echo "$1" | tee -a "$work/verdict"; }

run() { # NAME WORD...: `fedkd run` into $work/runs/NAME; its output comes in one piece, for several run at once
  local name=$1 began=$SECONDS code
  shift
  rm -rf "$work/runs/$name"
  fedkd run "out-dir=$work/runs/$name" "$@" >"$work/$name.log" 2>&1
  code=$?
  echo "--- $name: exit status $code after $((SECONDS - began)) s: fedkd run $*"
  grep -v '^\$ ' "$work/$name.log" | tail -n "$([ $code = 0 ] && echo 24 || echo 40)"
  [ $code = 0 ] || verdict "FAILED: $name, $(grep -m1 '^error' "$work/$name.log" || echo "exit status $code")"
  return $code
}

judge() { verdict "$(python3 "$kit/judge.py" "$@")"; }
took() { grep -o 'completed in .*' "$work/$1.log"; }

part_a() {
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,mig.mode.current --format=csv
  nvcc --version | tail -n 2
  uname -r; nproc; free -g | head -n 2; df -h /dev/shm /tmp | cat
  python3 - <<'PY' | tee -a "$work/verdict"
import torch
import torchvision

said = f"torch {torch.__version__}, torchvision {torchvision.__version__}, cuDNN {torch.backends.cudnn.version()}"
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    said += f", {about.name}, {about.total_memory / 2**30:.0f} GiB, a product of {float((x @ x).float().std()):.1f}"
    print("ok:", said)
else:
    print("NO GPU:", said)
PY
  python3 - "$work/gpus" <<'PY' | tee -a "$work/verdict"
import sys

from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

found = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
print(f"Ray finds {found} GPU{'s' * (found != 1)} by itself" + ("" if found else ": LOOK, it is told --gpus 1 from here on"))
open(sys.argv[1], "w").write("" if found else "--gpus 1")
PY
}

part_b() {
  fedkd doctor --ray 2>&1 | tee "$work/doctor.log"
  verdict "$(sed -n -e 's/^nothing is wrong/ok: &/p' -e '/^wrong: /p' "$work/doctor.log" | grep . || echo 'NO END')"
}

part_c() {
  run cpu-default --actors 6 device=cpu $(small) &
  run gpu-default $(gpu 0.25) $(small)
  wait
  judge accuracy "$work/runs/gpu-default" "$work/runs/cpu-default"
  verdict "on the GPU $(took gpu-default); on the CPU $(took cpu-default)"
}

part_d() {
  [ -f "$work/runs/gpu-default/summary.json" ] || run gpu-default $(gpu 0.25) $(small)
  local few=2
  [ "$DRY" ] && few=1
  run gpu-one-actor $([ "$DRY" ] && echo --actors 1 || gpu 1) $(small) "rounds=$few" controls= &
  run gpu-again $(gpu 0.25) $(small)
  wait
  judge same "$work/runs/gpu-again" "$work/runs/gpu-default"
  judge same "$work/runs/gpu-one-actor" "$work/runs/gpu-default" "$few"
}

part_e() {
  # Few shapes of batches: each is compiled by itself, in every actor.
  local few="--peers 2 models=cnn-small,resnet8 partition=iid proxy-size=384 batch-size=64 rounds=2 pretrain-epochs=2 controls="
  [ "$DRY" ] && few="--peers 2 models=mlp partition=iid proxy-size=384 batch-size=64 rounds=1 pretrain-epochs=1 controls="
  run fast $(gpu 0.25) fast=true $(small) &
  run eager $(gpu 0.5) $few &
  run compiled $(gpu 0.5) $few compiled=true
  wait
  [ -d "$work/runs/gpu-default" ] && judge accuracy "$work/runs/fast" "$work/runs/gpu-default"
  judge accuracy "$work/runs/compiled" "$work/runs/eager"
  verdict "compiled $(took compiled); as it comes $(took eager)"
}

part_r() {
  [ -f "$kit/data/cifar10.npz" ] || { verdict "no real data travelled"; return; }
  local words="--peers 2 dataset=npz:$kit/data/cifar10.npz normalize=imagenet models=resnet20,resnet32
    checkpoints=$kit/data/cifar10_resnet20.pt,$kit/data/cifar10_resnet32.pt pretrain-epochs=0 learning-rate=0.0001
    proxy-size=500 distill-epochs=1 batch-size=64 controls="
  run cifar-cpu --actors 2 device=cpu rounds=1 $words &
  run cifar-gpu $(gpu 0.5) "rounds=$([ "$DRY" ] && echo 1 || echo 3)" $words
  wait
  judge accuracy "$work/runs/cifar-gpu" "$work/runs/cifar-cpu"
}

bench() { # FILE OPTION...
  local file=$out/$1
  shift
  fedkd bench gpu --seconds $((LIMIT - 5)) --json "$file" "$@" ${DRY:+--quick} 2>&1 | tee "$work/bench.log"
  verdict "$(grep -E '^(best of|no ratio|There is no GPU|error)' "$work/bench.log" || echo 'NO END')"
  [ ! -s "$file" ] || python3 - "$file" <<'PY' | tee -a "$work/verdict"
import json
import sys

found = json.load(open(sys.argv[1]))
done = [f"{r['fleet']}/{r['actors']}{'c' * r['compiled']} {r['images_per_second']:,.0f}" for r in found.get("rows", ())]
bare, plain = (f"{found[key]:,.0f}" if found.get(key) else "none" for key in ("bare", "plain"))
print(f"images/s: bare {bare}, plain {plain}; " + ", ".join(done) + f"; missing: {', '.join(found['missing']) or 'none'}")
PY
}

part_f() { bench gpu.json --plain; }
part_k() { bench gpu-compiled.json --compiled --fleet resnet18; }

part_g() {
  python3 - "$out" <<'PY' | tee -a "$work/verdict"
import json
import sys
from pathlib import Path

files = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("gpu*.json"))]
rows = [row for found in files for row in found["rows"] if "peak_mib" in row]
for fleet, compiled in dict.fromkeys((row["fleet"], row["compiled"]) for row in rows):
    own = sorted((r for r in rows if (r["fleet"], r["compiled"]) == (fleet, compiled)), key=lambda r: r["actors"])
    said = (f"{r['actors']} actors {r['peak_mib'] - r['before_mib']:,.0f} MiB" for r in own)
    print(f"peak, {fleet}{', compiled' * compiled}: {', '.join(said)}")
if not rows:
    print("no reading: nothing in gpu.json")
PY
}

part_t() {
  python3 -m pytest -q -n 12 --dist loadgroup -m quick -p no:cacheprovider --no-header \
    --continue-on-collection-errors --timeout 120 2>&1 | tail -n 40 | tee "$work/tests.log"
  verdict "$(tail -n 1 "$work/tests.log")"
}

export -f gpu small verdict run judge took bench part_a part_b part_c part_d part_e part_f part_g part_k part_r part_t

smi=$out/smi.csv
nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu,clocks.sm,power.draw --format=csv,noheader,nounits -lms 500 \
  >>"$smi" 2>/dev/null &
smi_pid=$!
trap 'kill "$smi_pid" 2>/dev/null' EXIT # also of a script that is stopped: it would write on for ever
lines() { wc -l <"$smi" 2>/dev/null || echo 0; }

summary=()
part() { # LETTER LIMIT TITLE
  [[ $parts == *$1* ]] || return
  local left=$((budget - SECONDS - 6)) began=$SECONDS from code peak
  if [ $left -lt 12 ] && [ "$1" != g ]; then
    summary+=("$1  not run  $3: $left s were left")
    return
  fi
  export LIMIT=$(($2 < left ? $2 : (left > 5 ? left : 5)))
  echo; echo "===== $1: $3 (after $SECONDS s, for at most $LIMIT s)"
  : >"$work/verdict"
  from=$(lines)
  timeout -k 20 "$LIMIT" bash -c "part_$1"
  code=$?
  if [ $code = 124 ] || [ $code = 137 ]; then
    while IFS= read -r log; do echo "--- cut off: $(basename "$log")"; tail -n 12 "$log"; done \
      < <(find "$work" -maxdepth 1 -name '*.log' -newer "$work/verdict" -size +0)
  fi
  peak=$(tail -n +$((from + 1)) "$smi" 2>/dev/null | awk -F', *' '$2 > m {m = $2} {u += $3} END {if (NR) printf "GPU peak %d MiB, busy %d %%", m, u / NR}')
  summary+=("$1  $([ $code = 0 ] && echo done || { [ $code = 124 ] && echo TIMEOUT || echo "exit $code"; })  $((SECONDS - began)) s  $3${peak:+  [$peak]}")
  while IFS= read -r line; do summary+=("     $line"); done <"$work/verdict"
  printf '%s\n' "${summary[@]}" >"$out/summary.txt"
  tar -C "$work" --exclude=peers --exclude='*.safetensors' -czf "$out/runs.tgz" . 2>/dev/null
}

part a 30 "machine"
part b 60 "fedkd doctor"
part c 130 "default job"
part d 130 "same seed"
part e 220 "fast path, compiled"
part r 100 "real checkpoints"
part t 240 "quick tests"
half=$(((budget - SECONDS) / 2)) # so that the compiled rows, where asked for, have the other one
part f "$([[ $parts == *k* ]] && echo $half || echo 600)" "bench gpu"
part k 600 "bench gpu, compiled"
part g 10 "memory"

kill "$smi_pid" 2>/dev/null
[ -s "$smi" ] || rm -f "$smi"
echo; echo "===== summary, after $SECONDS s"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
rm -rf "$work"
echo "all of it: $out"
exec 1>&3 2>&4
for _ in {1..20}; do kill -0 "$tee_pid" 2>/dev/null || break; sleep 0.1; done # not longer, should something hold the pipe
