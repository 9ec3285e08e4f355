#!/usr/bin/env bash
# Train on one node or many: one torchrun per node, one process per GPU.
#
# usage: [VARIABLE=value ...] launch/torchrun.sh [--print] key=value ...
#
#   launch/torchrun.sh model=gpt_100m precision=nvfp4
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh model=gpt_6_7b   # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh model=gpt_6_7b   # on node1
#   MAX_RESTARTS=3 launch/torchrun.sh model=gpt_100m run_dir=runs/a resume=auto
#
#   --print          print the command and leave
#   -h, --help       this text
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, or 1 without any)
#   NNODES           nodes (default 1); with MAX_RESTARTS also MIN:MAX, to go on with fewer or more
#   NODE_RANK        this node's number (default: Slurm's, or 0)
#   MASTER_ADDR      host of node 0; needed for more than one node
#   MASTER_PORT      a free port there (default 29500)
#   MAX_RESTARTS     how often the processes are started anew after one failed (default 0); they
#                    go on from the last checkpoint, so it takes resume=auto among the arguments
#   RDZV_ENDPOINT    host:port of a rendezvous, in place of NODE_RANK and MASTER_*
#   RDZV_ID          the job's name there (default fp4pretrain)
#   RDZV_CONF        its options, such as join_timeout=3600: seconds to wait for nodes (default 600)
#   LOCAL_ADDR       this node's address for the others, where its host name does not resolve to it
#                    (default on one node: 127.0.0.1)
#
# The network interface is named to the libraries, where a node has several: NCCL_SOCKET_IFNAME=eth0
# and GLOO_SOCKET_IFNAME=eth0 (gloo writes checkpoints on GPUs too).
#
# With MAX_RESTARTS, a node that was lost may be replaced: start the same command on
# another within join_timeout. The node that hosts the rendezvous (node 0, or RDZV_ENDPOINT's) is the
# one that must live; a batch system that starts the job again covers it.
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

# The environment that this is called in, or the one that make has made.
if ! command -v torchrun >/dev/null; then
  PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
  if ! command -v torchrun >/dev/null; then
    echo "torchrun: not found; activate the environment that fp4pretrain is installed in, or run make train" >&2
    exit 2
  fi
fi

nnodes="${NNODES:-1}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}"
restarts="${MAX_RESTARTS:-0}"
port="${MASTER_PORT:-29500}"
python="$(dirname "$(command -v torchrun)")/python"
[[ -x "$python" ]] || python=python3
nproc="${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

if [[ ("$restarts" != 0 || "$nnodes" == *:*) && " $* " != *" resume=auto "* ]]; then
  echo "MAX_RESTARTS: what is started anew goes on from its checkpoints; add resume=auto" >&2
  exit 2
fi

where=(--nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$restarts")
rendezvous=(--rdzv-backend c10d --rdzv-id "${RDZV_ID:-fp4pretrain}")
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
  where+=("${rendezvous[@]}" --rdzv-endpoint "$RDZV_ENDPOINT")
  where+=(${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"})
elif [[ "$nnodes" == 1 ]]; then
  where+=(--standalone) # finds a free port, so that two runs can share a machine
  LOCAL_ADDR="${LOCAL_ADDR:-127.0.0.1}" # this node's own name need not resolve
elif [[ -z "${MASTER_ADDR:-}" ]]; then
  echo "MASTER_ADDR: not set for $nnodes nodes; give the host name of node 0" >&2
  exit 2
elif [[ "$restarts" == 0 && "$nnodes" != *:* ]]; then
  where+=(--node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$port")
else
  # torchrun's static rendezvous above cannot take in a node that comes later. Node 0 is told that
  # it hosts: left to itself, torchrun compares host names, which often do not match an address.
  where+=("${rendezvous[@]}" --rdzv-endpoint "$MASTER_ADDR:$port")
  where+=(--rdzv-conf "is_host=$((node_rank == 0))${RDZV_CONF:+,$RDZV_CONF}")
fi
where+=(${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
if [[ "$nnodes" != 1 && "${where[*]}" != *--master-addr* ]]; then
  # torchrun's own store outlives a restart, but the processes take it for a new one: they would look
  # for each other where the processes before them were (torch 2.13). So each start makes its own, at
  # a port that torchrun chooses; should another program take it first, that start fails and counts.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
fi

# Megatron's overlap of communication with GEMMs on GPUs before Blackwell counts on kernels starting
# in the order of their launch, which takes a single hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# After SIGTERM torchrun kills what has not ended in 30 seconds, too few to write a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

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
