#!/usr/bin/env bash
# gpt_30m on the standard library's bytes with BF16, FP8 and NVFP4, or other recipes: figures of docs/gpu.md.
# A minute a run on one H100.
#
# usage: [SEEDS="1 2"] [RECIPES="bf16 fp8 nvfp4"] scripts/gpt_30m.sh [FOLDER] [key=value ...]
# (default runs/gpt_30m; gaps are to the first recipe)
set -euo pipefail
folder=${1:-runs/gpt_30m}
shift || true
python=${PYTHON:-python3}
read -ra recipes <<<"${RECIPES:-bf16 fp8 nvfp4}"
for seed in ${SEEDS:-1 2}; do
    for recipe in "${recipes[@]}"; do
        "$python" -m fp4pretrain train model=gpt_30m model.vocab_size=257 precision="$recipe" \
            seed="$seed" train.micro_batch=64 train.global_batch=64 train.steps=500 \
            train.eval_interval=100 data.valid_tokens=131072 train.log_interval=5 \
            optim=wsd optim.warmup=0.05 optim.lr=1.2e-3 optim.min_lr=1.2e-5 checkpoint.at_end=false \
            logging.wandb.mode=disabled logging.console=lines \
            run_dir="$folder/$recipe-seed$seed" "$@" | tail -n 1
    done
done
runs=()
for recipe in "${recipes[@]}"; do
    runs+=("$folder/$recipe"-seed*)
done
"$python" -m fp4pretrain compare "${runs[@]}" --out "$folder/gap.png"
