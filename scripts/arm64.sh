#!/bin/bash
# Builds the library for ARM64 Linux with Debian's cross compiler, and runs C++ tests under qemu-user. The torch is the
# wheel for aarch64 from the package index. Needs: apt-get install g++-aarch64-linux-gnu qemu-user libgtest-dev
#
#   scripts/arm64.sh [FILTER]      tests as of --gtest_filter; emulation takes minutes for what takes seconds
#
# BUILD is the folder of everything (build/arm64), TORCH the version, PYTHON one with pip, cmake and ninja.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BUILD=${BUILD:-build/arm64}
TORCH=${TORCH:-2.11.0}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$BUILD"
BUILD=$(realpath "$BUILD")
PATH="$(dirname "$(realpath -s "$PYTHON")"):$PATH"
SYSROOT=/usr/aarch64-linux-gnu

download() {
  local platforms=()
  for tag in 2014 _2_24 _2_25 _2_26 _2_27 _2_28; do platforms+=(--platform "manylinux${tag}_aarch64"); done
  "$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 "${platforms[@]}" \
    --dest "$BUILD/wheels" "$@"
}
if [ ! -d "$BUILD/site/torch" ]; then
  # libtorch_cpu.so of a CUDA build wants these two libraries; no driver or GPU.
  download "torch==$TORCH"
  download "nvidia-cuda-runtime>=13.0,<13.1" "nvidia-cuda-cupti>=13.0,<13.1"
  for wheel in "$BUILD"/wheels/*.whl; do unzip -q -o "$wheel" -d "$BUILD/site"; done
  rm -r "$BUILD/wheels"
fi
# libtorch.so is empty, but in a CUDA build brings the CUDA libraries: another empty one takes its place.
mkdir -p "$BUILD/empty"
echo | aarch64-linux-gnu-g++ -shared -Wl,-soname,libtorch.so -o "$BUILD/empty/libtorch.so" -x c++ -

cross=(-GNinja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Release)
cmake -S /usr/src/googletest -B "$BUILD/gtest" "${cross[@]}" -DBUILD_GMOCK=OFF -DCMAKE_INSTALL_PREFIX="$BUILD/prefix"
cmake --build "$BUILD/gtest" --target install
cmake -S . -B "$BUILD/build" "${cross[@]}" -DTORCH_SPE_CUDA=0 -DTORCH_SPE_TESTS=ON \
  -DTORCH_SPE_TORCH_DIR="$BUILD/site/torch" -DGTest_ROOT="$BUILD/prefix"
cmake --build "$BUILD/build" --target torch_spe_tests

libraries=$BUILD/empty:$BUILD/site/torch/lib:$BUILD/site/nvidia/cu13/lib:$SYSROOT/lib
exec qemu-aarch64 -L "$SYSROOT" -E "LD_LIBRARY_PATH=$libraries" "$BUILD/build/torch_spe_tests" \
  --gtest_brief=1 --gtest_filter="${1:-*}"
