#!/bin/bash
# Checks torch_spe on a machine with a GPU: builds it, runs the tests that use a GPU, compute-sanitizer
# over a short set, and the benchmarks. Every part has a time limit, in seconds 200 (build) + 170 (tests)
# + 45 + 45 (compute-sanitizer) + 2 * 40 (benchmarks) = 540, for 16 cores. Logs, results.json and
# summary.txt go to OUT_DIR as each part ends; a part that runs out of time leaves what it has.
#
# usage: scripts/gpu_check.sh OUT_DIR [PART ...]    parts: build tests memcheck racecheck benchmarks
# PYTHON is the interpreter that has torch (default: .venv/bin/python if there is one, else python3).
# SPE_CHECKOUT, a checkout of aliutkus/spe, is measured beside the library.
set -u
if [ $# -lt 1 ]; then
  sed -n '7,9s/^# //p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
OUT_DIR=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(build tests memcheck racecheck benchmarks)
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

# part NAME SECONDS COMMAND...: runs it under the limit, if NAME was asked for.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ " ${PARTS[*]} " == *" ${name%%-*} "* ]] || return 0
  echo "== $name (at most $limit s): $*"
  # Interrupted, pytest and the benchmarks still report.
  timeout --signal=INT --kill-after=5 "$limit" "$@" > "$OUT_DIR/$name.log" 2>&1
  status=$?
  [ $status -eq 137 ] && status=124
  tail -n 15 "$OUT_DIR/$name.log"
  RESULTS+=("{\"part\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - start))}")
  printf '%-12s %-9s %4d s\n' "$name" \
    "$([ $status -eq 0 ] && echo passed || { [ $status -eq 124 ] && echo 'timed out' || echo failed; })" \
    $((SECONDS - start)) >> "$OUT_DIR/summary.txt"
  printf '{"results": [%s]}\n' "$(IFS=,; echo "${RESULTS[*]}")" > "$OUT_DIR/results.json"
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

SHORT=("$PYTHON" scripts/gpu_short_set.py)
part build 200 "$PYTHON" setup.py build_ext --inplace &&
  "$PYTHON" -m torch_spe >> "$OUT_DIR/machine.txt" 2>&1
# Every file in a process of its own, eight at a time: that needs no plugin, and a crash or the end of
# the time costs the results of one file only. Left out are files that compute nothing on a GPU and
# whose imports may be missing. Status 5: no test of the file has that name.
printf '%s\n' tests/python/test_*.py |
  grep -vE '_(benchmarks|chorales|cuda_emulation_catches|digits|experiment_tasks|experiments|music|packaging|source_rules|virtual_gpu_catches)\.py$' \
    > "$OUT_DIR/tests.txt"
export PYTHON OUT_DIR
export TORCH_SPE_TEST_ALL=1 TORCH_SPE_FUZZ_CALLS=400  # all combinations of parameters
part tests 170 env OMP_NUM_THREADS=2 xargs -a "$OUT_DIR/tests.txt" -P 8 -n 1 bash -c '
  report=$OUT_DIR/$(basename "$1" .py)
  timeout --foreground --signal=INT --kill-after=3 165 \
    "$PYTHON" -m pytest "$1" -vv -m "not long" -k "cuda and not emulated and not virtual_gpu" -p no:cacheprovider --tb=short \
    --junitxml="$report.xml" > "$report.log" 2>&1
  status=$?
  echo "$(tail -n 1 "$report.log") $1"
  [ $status -eq 0 ] || [ $status -eq 5 ]
' bash
grep -h "^\(FAILED\|ERROR\) " "$OUT_DIR"/test_*.log 2> /dev/null | tail -n 40
if command -v compute-sanitizer > /dev/null; then
  # Only the library's own kernels: PyTorch's would take most of the time.
  SANITIZER=(compute-sanitizer --error-exitcode 9 --kernel-name kns=torch_spe)
  part memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${SANITIZER[@]}" --tool memcheck "${SHORT[@]}"
  part racecheck 45 "${SANITIZER[@]}" --tool racecheck "${SHORT[@]}" --tiny
else
  echo "compute-sanitizer is not on the PATH: skipped" | tee -a "$OUT_DIR/summary.txt"
fi
# The whole first, then its parts; a batch with which the longest sequences fit.
for dtype in bfloat16 float32; do
  part "benchmarks-$dtype" 40 "$PYTHON" -m benchmarks attend layer attention phasor exact sine conv \
    --device cuda --dtype "$dtype" --seconds 0.1 --shapes 8x512 8x4096 2x16384 1x65536 \
    ${SPE_CHECKOUT:+--spe-checkout "$SPE_CHECKOUT"} --output "$OUT_DIR/benchmarks-$dtype.json"
done

cat "$OUT_DIR/summary.txt"
! grep -q 'failed\|timed out' "$OUT_DIR/summary.txt"
