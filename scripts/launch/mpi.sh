#!/usr/bin/env bash
# A command under MPI, on this machine or, with HOSTS, on several: pip install mpi4py mpich.
#     HOSTS=node0,node1 RANKS=16 scripts/launch/mpi.sh image_train --data_dir DATA --log_dir runs/mpi ...
# RANKS: processes on all machines together (default: one for each GPU of this one).
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/common.sh

exec mpiexec -n "$RANKS" ${HOSTS:+-hosts "$HOSTS"} "${PYTHON:-python}" "${words[@]}"
