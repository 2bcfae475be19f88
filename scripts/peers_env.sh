#!/bin/sh
# Make the environments that benchmarks/peers.py needs beside our own: scripts/peers_env.sh [FOLDER], by default build/peers.
# PYTHON names a Python of at most 3.11, which DeepSparse needs. An engine that cannot be installed is left out; the benchmark then says so.
set -eu
folder=${1:-build/peers}
python=${PYTHON:-python3.11}
mkdir -p "$folder"

make_env() {
    name=$1
    shift
    [ -x "$folder/$name/bin/python" ] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || echo "could not install $*" >&2
}

# 1.9.0 is a stub that only says that it is deprecated.
make_env deepsparse deepsparse==1.8.0 numpy==1.26.4
make_env engines numpy openvino onnxruntime onnx mkl
make_env engines ai-edge-litert
