#!/usr/bin/env bash
# All that wants a GPU, in under ten minutes: the tests marked gpu, then the tables of docs/benchmarks.md, to a folder.
#     scripts/gpu_checks.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-checks}
python=${PYTHON:-python}
mkdir -p "$out"
code=0

part() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || { code=1; echo "   failed or took longer than $limit s"; }
    tail -n 3 "$out/$name.txt"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU"; exit 2; }
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
part 170 tests "$python" -m pytest tests/training/test_gpu.py -q -m 'gpu' -p no:cacheprovider
part 190 network "$python" benchmarks/network.py --rounds 2 --only 64x64,256x256 --compile --json "$out/network.json"
part 70 sampling "$python" benchmarks/sampling.py --rounds 1 --json "$out/sampling.json"
part 140 training "$python" benchmarks/training.py --rounds 1 --only emoji32,64x64,256x256 --json "$out/training.json"
exit "$code"
