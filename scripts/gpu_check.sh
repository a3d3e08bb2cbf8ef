#!/bin/bash
# Checks torch_spe on a machine with a GPU: builds it, measures kernels, profiles some with Nsight
# Compute, runs the tests that use a GPU beside compute-sanitizer over a short set, and the
# benchmarks. Logs, results.json and summary.txt go to OUT_DIR as each part ends; a part that runs
# out of its time leaves what it has.
#
# usage: scripts/gpu_check.sh OUT_DIR [PART[=SECONDS] ...]
# parts and their seconds, for 16 cores: build=200 kernels=60 profile=60 tests=170 sanitizer=120
# (beside the tests) benchmarks=80
# PYTHON is the interpreter that has torch (default: .venv/bin/python if there is one, else python3).
# LIBRARY, a libtorch_spe.so for this torch that another machine has built, replaces the build of the
# kernels: 25 seconds instead of minutes. PYTHONPATH may hold flash-linear-attention (case `peers`).
# CASES and PROFILED, one case a line, are what is measured and profiled (gpu_measure.py).
# SPE_CHECKOUT, a checkout of aliutkus/spe, is measured beside the library.
set -u
if [ $# -lt 1 ]; then
  sed -n '7,14s/^# //p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
OUT_DIR=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
declare -A SECONDS_OF=([build]=200 [kernels]=60 [profile]=60 [tests]=170 [sanitizer]=120 [benchmarks]=80)
PARTS=()
for part in "${@:-build kernels profile tests sanitizer benchmarks}"; do
  for each in $part; do
    name=${each%=*}
    [ -n "${SECONDS_OF[$name]:-}" ] || { echo "unknown part $name: expected ${!SECONDS_OF[*]}" >&2; exit 2; }
    PARTS+=("$name")
    [ "$name" = "$each" ] || SECONDS_OF[$name]=${each#*=}
  done
done
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TORCH_SPE_BUILD_DIR=${TORCH_SPE_BUILD_DIR:-$PWD/build/gpu} TORCH_SPE_CUDA=1
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/*/; do
  [ -d "$folder" ] && PATH=$PATH:${folder%/}
done
RESULTS=()
: > "$OUT_DIR/summary.txt"

wanted() { [[ " ${PARTS[*]} " == *" $1 "* ]]; }

# record NAME STATUS SECONDS: of a part that has ended.
record() {
  local result=failed
  [ "$2" -eq 0 ] && result=passed
  [ "$2" -eq 124 ] || [ "$2" -eq 137 ] && result='timed out'
  RESULTS+=("{\"part\": \"$1\", \"status\": $2, \"seconds\": $3}")
  printf '%-20s %-9s %4d s\n' "$1" "$result" "$3" | tee -a "$OUT_DIR/summary.txt"
  printf '{"results": [%s]}\n' "$(IFS=,; echo "${RESULTS[*]}")" > "$OUT_DIR/results.json"
}

# part NAME SECONDS COMMAND...: runs it under the limit, with a log of that name.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  # Interrupted, pytest and the benchmarks still report.
  timeout --signal=INT --kill-after=5 "$limit" "$@" > "$OUT_DIR/$name.log" 2>&1
  status=$?
  tail -n 15 "$OUT_DIR/$name.log" | cut -c1-300
  record "$name" $status $((SECONDS - start))
  return $status
}

# Only the architecture of this machine's GPU, unless told otherwise: the build is then half as long.
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
    echo "no GPU, or no torch that sees it: $PYTHON" | tee "$OUT_DIR/summary.txt" >&2
    exit 1
  }
  export TORCH_CUDA_ARCH_LIST
fi
{
  date -u +%FT%TZ
  git rev-parse HEAD 2> /dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  nproc
} > "$OUT_DIR/machine.txt" 2>&1
cat "$OUT_DIR/machine.txt"

# The module that Python imports, beside the library that holds everything else.
link_module() {
  cp "$LIBRARY" python/torch_spe/libtorch_spe.so
  "$PYTHON" - > "$OUT_DIR/paths.txt" << 'END' || return
import json, os, sysconfig, torch
root = os.path.dirname(torch.__file__)
build = {"torch": torch.__version__.split("+")[0], "cuda": torch.version.cuda}
open("python/torch_spe/_build_info.json", "w").write(json.dumps(build))
print(sysconfig.get_paths()["include"], root, sysconfig.get_config_var("EXT_SUFFIX"))
END
  read -r include root suffix < "$OUT_DIR/paths.txt"
  g++ -O1 -DNDEBUG -std=c++20 -fPIC -shared -fvisibility=hidden -Icsrc -Icsrc/include -isystem "$include" \
    -isystem "$root/include" -isystem "$root/include/torch/csrc/api/include" csrc/bindings.cpp \
    -o "python/torch_spe/_C$suffix" -Lpython/torch_spe -ltorch_spe -L"$root/lib" -ltorch -ltorch_cpu \
    -ltorch_python -lc10 -Wl,-rpath,'$ORIGIN'
}
if wanted build; then
  if [ -n "${LIBRARY:-}" ]; then
    export LIBRARY OUT_DIR PYTHON
    export -f link_module
    part build "${SECONDS_OF[build]}" bash -c link_module
  else
    part build "${SECONDS_OF[build]}" "$PYTHON" setup.py build_ext --inplace
  fi && "$PYTHON" -m torch_spe >> "$OUT_DIR/machine.txt" 2>&1 || exit 1
fi

# While nothing else uses the GPU: times first.
DEFAULT_CASES="linear_attention
linear_attention decay=1
linear_attention rms=1 decay=2
linear_attention R=192 rms=1 decay=2
linear_attention causal=0
linear_attention causal=0 decay=1
linear_attention rms=1 decay=4
linear_attention R=192 rms=1 decay=4
linear_attention B=1 N=65536
linear_attention B=1 N=2048
linear_attention dtype=float32
exact_sines
sine_features
phasor_filter
sine_filter
rotary
polyphase_filter
conv_filter
peers"
mapfile -t CASE_LIST <<< "${CASES:-$DEFAULT_CASES}"
# Few cases and small ones: every kernel is run some 20 times.
mapfile -t PROFILED_LIST <<< "${PROFILED:-linear_attention R=192 rms=1 decay=2 B=2
phasor_filter B=4 N=2048
sine_filter N=1024}"
wanted kernels &&
  part kernels "${SECONDS_OF[kernels]}" "$PYTHON" tests/virtual_gpu/gpu_measure.py "${CASE_LIST[@]}" \
    --repeats 10 --kernels 6 --json "$OUT_DIR/kernels.json"
if wanted profile; then
  if command -v ncu > /dev/null; then
    part profile "${SECONDS_OF[profile]}" ncu --clock-control none --profile-from-start off \
      --kernel-name-base demangled -k regex:torch_spe --section SpeedOfLight --section Occupancy \
      --section WarpStateStats --section LaunchStats --section SourceCounters -f -o "$OUT_DIR/profile" \
      "$PYTHON" tests/virtual_gpu/gpu_measure.py --once "${PROFILED_LIST[@]}"
  else
    echo "ncu is not on the PATH: nothing is profiled" | tee -a "$OUT_DIR/summary.txt"
  fi
fi

# Only the library's own kernels: PyTorch's would take most of the time.
SANITIZERS=()
if wanted sanitizer; then
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      [ $tool = memcheck ] && export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      timeout "${SECONDS_OF[sanitizer]}" compute-sanitizer --error-exitcode 9 --kernel-name kns=torch_spe \
        --tool $tool "$PYTHON" scripts/gpu_short_set.py --tiny > "$OUT_DIR/$tool.log" 2>&1 &
      SANITIZERS+=($!)
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
    done
  else
    echo "compute-sanitizer is not on the PATH: skipped" | tee -a "$OUT_DIR/summary.txt"
  fi
fi

# The tests in parts of some hundred, each in a process of its own, as many at a time as there are
# cores: a crash or the end of the time costs the results of one part only. The long ones begin.
# Left out are files that compute nothing on a GPU and whose imports may be missing. Status 5: no test
# of the file has that name.
if wanted tests; then
  LEFT_OUT='benchmarks|chorales|cuda_build|cuda_emulation_catches|digits|distributed|distributed_(compiled|example|layers|models)|experiment_tasks|experiments|lra|lra_models|lra_tasks|music|packaging|pages|public_arguments|release|source_rules|virtual_gpu_catches'
  MANY='cuda_kernels:8 fuzz:6 compiled_layers:4 cuda_decay:6 decay:3 decay_modules:3 range_of_features:2 hf:2 conv_filter:2 sine_attention:2 linear_attention:2 state:2 modules:2 attention_modules:2'
  {
    for file in $MANY; do
      for ((i = 0; i < ${file#*:}; i++)); do echo "${file%:*} $i ${file#*:}"; done
    done
    for file in tests/python/test_*.py; do
      name=$(basename "$file" .py)
      name=${name#test_}
      [[ $name =~ ^($LEFT_OUT)$ || " $MANY" == *" $name:"* ]] || echo "$name 0 1"
    done
  } > "$OUT_DIR/tests.txt"
  mkdir -p "$OUT_DIR/tests"
  export PYTHON OUT_DIR OMP_NUM_THREADS=1 TORCH_SPE_TEST_LEVEL=all TORCH_SPE_SKIP_MISSING=1 TORCH_SPE_FUZZ_CALLS=${TORCH_SPE_FUZZ_CALLS:-100}
  DEADLINE=$(($(date +%s) + SECONDS_OF[tests]))
  export DEADLINE
  PYTHONPATH=$PYTHONPATH:$PWD/scripts part tests $((SECONDS_OF[tests] + 10)) \
    xargs -a "$OUT_DIR/tests.txt" -P "$(nproc)" -n 3 bash -c '
    name=$1 report=$OUT_DIR/tests/$1.$2 left=$((DEADLINE - $(date +%s)))
    [ $left -gt 5 ] || { echo "not run: $1 $2/$3"; exit 0; }
    TEST_PART=$2/$3 timeout --foreground --signal=INT --kill-after=3 $left \
      "$PYTHON" -m pytest tests/python/test_$1.py -vv -m "not long" -k "cuda and not emulated and not virtual_gpu" \
      -p gpu_test_part -p no:cacheprovider --tb=short -rfE --junitxml="$report.xml" > "$report.log" 2>&1
    status=$?
    [ $status -eq 5 ] && exit 0
    echo "$(tail -n 1 "$report.log") $1 $2/$3"
    [ $status -eq 0 ]
  ' bash
  cat "$OUT_DIR"/tests/*.log 2> /dev/null | grep "^\(FAILED\|ERROR\) " | cut -c1-300 | tee "$OUT_DIR/failed.txt"
fi
for i in "${!SANITIZERS[@]}"; do
  wait "${SANITIZERS[$i]}"
  status=$?
  tools=(memcheck racecheck)
  record "${tools[$i]}" $status "${SECONDS_OF[sanitizer]}"
done

# The whole first, then its parts; a batch with which the longest sequences fit.
if wanted benchmarks; then
  for dtype in bfloat16 float32; do
    part "benchmarks-$dtype" $((SECONDS_OF[benchmarks] / 2)) "$PYTHON" -m benchmarks attend layer attention phasor exact sine conv \
      --device cuda --dtype "$dtype" --seconds 0.1 --shapes 8x512 8x4096 2x16384 1x65536 \
      ${SPE_CHECKOUT:+--spe-checkout "$SPE_CHECKOUT"} --output "$OUT_DIR/benchmarks-$dtype.json"
  done
fi

# Takes a minute or two of one core.
if [ -f "$OUT_DIR/profile.ncu-rep" ]; then
  for page in raw source; do
    ncu -i "$OUT_DIR/profile.ncu-rep" --page $page --csv 2> /dev/null | gzip > "$OUT_DIR/profile.$page.csv.gz"
  done
fi

cat "$OUT_DIR/summary.txt"
! grep -q 'failed\|timed out' "$OUT_DIR/summary.txt"
