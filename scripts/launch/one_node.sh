#!/usr/bin/env bash
# A command on all GPUs of this machine; training goes on from its last checkpoint when a process fails.
#     scripts/launch/one_node.sh image_train --data_dir DATA --log_dir runs/one ...
# RANKS: processes (default: one for each GPU, else 1). RESTARTS: how often to begin again (3).
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/common.sh

exec torchrun --standalone --nproc_per_node "$RANKS" --max-restarts "${RESTARTS:-3}" "${words[@]}"
