#!/usr/bin/env bash
# A command on several machines: run it on each of them, with the same flags and a folder for --log_dir that all see.
#     NODES=4 NODE=0 HEAD=node0:29500 scripts/launch/several_nodes.sh image_train --data_dir DATA --log_dir runs/four ...
# NODES: machines. NODE: the number of this one, from 0. HEAD: host of number 0, and a free port there.
# RANKS, RESTARTS: as of one_node.sh, for each machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/common.sh
: "${NODES:?give the number of machines}" "${NODE:?give the number of this machine, from 0}" "${HEAD:?give HOST:PORT}"

exec torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${JOB:-guided-diffusion}" \
    --rdzv_conf "is_host=$([ "$NODE" = 0 ] && echo 1 || echo 0)" "${words[@]}"
