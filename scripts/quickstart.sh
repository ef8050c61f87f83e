#!/usr/bin/env bash
# From nothing to a merged model: set-up, LoRA training on two processes with each backend, merge, one answer.
set -euo pipefail

OUT=${OUT:-out/quickstart}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    cat <<EOF
bash scripts/quickstart.sh

Makes .venv, installs the pinned requirements and dsft, gets the embedded 135 M model, then on data/sample_*.parquet:
  1. trains LoRA on two processes with --backend fsdp      -> $OUT/fsdp
  2. trains the same on two processes with --backend zero3 -> $OUT/zero3
  3. merges the best checkpoint of the first               -> $OUT/fsdp/merged
  4. prints the validation losses before and after, and one prompt answered by the base and by the merged model.
What is there already is used again; delete $OUT to start over.

  OUT=folder             where the runs go (default out/quickstart)
  PYTHON=python3.12      which interpreter makes .venv
  DSFT_TORCH=cpu|cuda    which build of torch (default: cuda where nvidia-smi lists a GPU)
EOF
    exit 0
fi
if [[ $# -gt 0 ]]; then
    echo "error: quickstart.sh takes no '$1'; see --help" >&2
    exit 1
fi

cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt

flags=(
    --model smollm2-135m
    --train_files data/sample_train.parquet --val_files data/sample_val.parquet
    --lora_rank 16 --lora_alpha 32 --train_batch_size 8 --lr 1e-3
    --validate_before_training
)

echo "== training with fsdp on two processes"
torchrun --standalone --nproc_per_node 2 dsft/train.py --backend fsdp "${flags[@]}" --output_dir "$OUT/fsdp"

echo "== training with zero3 on two processes"
deepspeed --num_accelerators 2 dsft/train.py --backend zero3 "${flags[@]}" --output_dir "$OUT/zero3"

if [[ ! -d "$OUT/fsdp/merged" ]]; then
    echo "== merging the best checkpoint"
    python -m dsft.merge --checkpoint "$OUT/fsdp"
fi

echo "== result"
python scripts/quickstart_report.py "$OUT"
