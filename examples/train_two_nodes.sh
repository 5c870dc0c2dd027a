#!/usr/bin/env bash
# Trains on two machines of 8 GPUs each. Run it on both, with the first one's name or address, and the same settings:
#
#   examples/train_two_nodes.sh node1.example.org meta-llama/Llama-2-7b --out /shared/runs/llama
#
# The run folder (--out, or --runs) has to be on a file system that both machines share. When a process dies, torchrun
# ends all of them on its machine, and those of the other one lose their connection and end too; start both again with
# --resume and the run folder in place of the model and --out. GPUS and PORT come from the environment.
# Where machines have several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one to use.
set -euo pipefail

first=${1:?the name of the first machine}
shift
exec torchrun --nnodes 2 --nproc-per-node "${GPUS:-8}" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id rcpconv \
  -m rcpconv quantize "$@"
