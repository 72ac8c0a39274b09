#!/bin/sh
# Builds the example with one command: build.sh OUTPUT [PYTHON]. The torch of PYTHON is compiled and linked against.
set -eu
here=$(dirname "$0")
torch=$("${2:-python3}" -c "import os, torch; print(os.path.dirname(torch.__file__))")
${CXX:-g++} -std=c++20 -O1 -I"$torch/include" "$here/main.cpp" -o "$1" \
    -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
