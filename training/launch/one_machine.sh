#!/bin/bash
# Eight GPUs of one machine, networks cut over all of them.
#
#   training/launch/one_machine.sh training/recipes/sdxl/dmd2_4step.yaml --data image-cache/ --output_dir runs/sdxl
#
# LoRA recipes are best left whole on every GPU (docs/scaling.md): add --fsdp none. What is a flag of a recipe is given
# after it; the global batch is train_batch_size x gradient_accumulation_steps x 8.
set -euo pipefail
recipe=${1:?usage: one_machine.sh RECIPE.yaml [flags of fastdiff distill]}
shift
# --standalone: no address or port to agree on. The run ends as soon as one process fails; --max-restarts 3 would begin
# it again by itself, and --resume_from_checkpoint latest lets it go on from the last checkpoint.
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" training/train.py \
    --config "$recipe" --fsdp full_shard --resume_from_checkpoint latest "$@"
