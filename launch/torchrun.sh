#!/usr/bin/env bash
# Train on one node or many: one torchrun per node, one process per GPU.
#
# usage: [VARIABLE=value ...] launch/torchrun.sh [--print] key=value ...
#
#   launch/torchrun.sh model=gpt_100m precision=nvfp4
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh model=gpt_6_7b   # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh model=gpt_6_7b   # on node1
#
#   --print          print the command and leave
#   -h, --help       this text
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, or 1 without any)
#   NNODES           nodes (default 1)
#   NODE_RANK        this node's number (default: Slurm's, or 0)
#   MASTER_ADDR      host of node 0; needed for more than one node
#   MASTER_PORT      a free port there (default 29500)
#   RDZV_ENDPOINT    host:port of a rendezvous, in place of NODE_RANK and MASTER_*
#   RDZV_ID          the job's name there (default fp4pretrain)
#
# Everything else is the run's config, which the arguments set. SIGUSR1 to this script is passed on
# to the training processes (a batch system sends it shortly before it ends the job).
set -euo pipefail

usage() {
  sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

print_only=false
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  --print)
    print_only=true
    shift
    ;;
esac

nnodes="${NNODES:-1}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}"
nproc="${NPROC_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

where=(--nnodes "$nnodes" --nproc-per-node "$nproc")
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
  where+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-fp4pretrain}")
elif [[ "$nnodes" == 1 ]]; then
  where+=(--standalone) # finds a free port, so that two runs can share a machine
elif [[ -n "${MASTER_ADDR:-}" ]]; then
  where+=(--node-rank "$node_rank" --master-addr "$MASTER_ADDR")
  where+=(--master-port "${MASTER_PORT:-29500}")
else
  echo "MASTER_ADDR: not set for $nnodes nodes; give the host name of node 0" >&2
  exit 2
fi

# Megatron's overlap of communication with GEMMs on GPUs before Blackwell counts on kernels starting
# in the order of their launch, which takes a single hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

command=(torchrun "${where[@]}" -m fp4pretrain train "$@")
if "$print_only"; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# torchrun itself would die of SIGUSR1, so its children get it. Every signal interrupts "wait": wait
# until torchrun has really ended; bash keeps its exit status for the last one.
"${command[@]}" &
agent=$!
trap 'pkill -USR1 -P "$agent" || true' USR1
trap 'kill -TERM "$agent" 2>/dev/null || true' TERM INT
while kill -0 "$agent" 2>/dev/null; do
  wait "$agent" || true
done
wait "$agent"
