#!/usr/bin/env bash
# Run the kernels' tests against a build with the address and undefined-behaviour sanitizers.
#   bash tests/sanitize.sh [python]
set -euo pipefail
python=$(readlink -f "$(dirname "$(command -v "${1:-python}")")")/$(basename "${1:-python}")
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cmake=$(dirname "$python")/cmake
"$cmake" -S "$root" -B "$scratch/build" -DGALA_MPI_SANITIZE=ON -DGALA_MPI_WERROR=ON \
    -DPython_EXECUTABLE="$python" --log-level=WARNING
"$cmake" --build "$scratch/build"

# A copy of the package with the sanitized extension, first on the path of modules. Without site (-S) no import hook
# of an editable install comes before it.
mkdir -p "$scratch/gala_mpi"
cp "$root/gala_mpi/__init__.py" "$scratch/gala_mpi/"
cp "$scratch"/build/_native*.so "$scratch/gala_mpi/"
cp "$root/tests/ground/test_native.py" "$root/tests/ground/native_reference.py" "$scratch/"

packages=$("$python" -c 'import os, sys; print(os.pathsep.join(p for p in sys.path if p.endswith("-packages")))')
export PYTHONPATH=$scratch:$packages PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD
cd "$scratch"
"$python" -S - <<PY
import gala_mpi._native as native
assert native.__file__.startswith("$scratch"), native.__file__
assert "__asan" in open(native.__file__, "rb").read().decode("latin-1"), "not the sanitized build"
PY
"$python" -S -W error -m pytest -q -p no:cacheprovider --rootdir "$scratch" test_native.py
