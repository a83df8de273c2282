#!/bin/sh
# Runs the kernels under the address, undefined-behaviour and thread sanitizers.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for kind in address,undefined thread; do
    build=$here/build/sanitize-$kind
    echo "== $kind"
    cmake -S "$here" -B "$build" -DCMAKE_BUILD_TYPE=Release -DEDGELEARN_SANITIZE=$kind \
        -DEDGELEARN_PYTHON=OFF -DEDGELEARN_DRIVER=ON >/dev/null
    cmake --build "$build" --parallel 2 >/dev/null
    "$build/driver"
done
