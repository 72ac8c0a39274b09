#!/bin/sh
# Builds the example: build.sh OUTPUT [PYTHON]. The torch and fxsparse of PYTHON are compiled and linked against.
# Beside OUTPUT comes libfxsparse.so, the operators of packed layers; a package without such layers does not need it.
set -eu
here=$(dirname "$0")
beside=$(dirname "$1")
python=${2:-python3}
torch=$("$python" -c "import os, torch; print(os.path.dirname(torch.__file__))")
"$python" -c "import sys; from fxsparse.kernels.build import build_operators; build_operators(sys.argv[1])" "$beside/libfxsparse.so"
${CXX:-g++} -std=c++20 -O1 -I"$torch/include" "$here/main.cpp" -o "$1" \
    -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10 \
    -L"$beside" -Wl,-rpath,'$ORIGIN' -lfxsparse
