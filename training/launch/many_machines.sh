#!/bin/bash
# Several machines without a scheduler: run this on each of them, with HEAD the name of one.
#
#   HEAD=node0 NODES=4 training/launch/many_machines.sh training/recipes/sdxl/dmd2_4step.yaml --data /nfs/cache
#
# The same by accelerate, with RANK 0 .. NODES - 1 given to each machine:
#   accelerate launch --multi_gpu --num_machines 4 --num_processes 32 --machine_rank $RANK \
#       --main_process_ip $HEAD --main_process_port 29500 training/train.py --config ... --fsdp hybrid_shard
set -euo pipefail
recipe=${1:?usage: many_machines.sh RECIPE.yaml [flags of fastdiff distill]}
shift
exec torchrun --nnodes "${NODES:?}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-id fastdiff --rdzv-backend c10d --rdzv-endpoint "${HEAD:?}:29500" \
    training/train.py --config "$recipe" --fsdp hybrid_shard --resume_from_checkpoint latest "$@"
