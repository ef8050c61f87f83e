#!/usr/bin/env bash
# From a fresh clone to a merged model: set-up, LoRA training with each backend, merge, one answer.
set -euo pipefail

OUT=${OUT:-out/quickstart}
MODEL=${MODEL:-smollm2-135m}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    cat <<EOF
bash scripts/quickstart.sh

Makes .venv, installs the pinned requirements and dsft, gets the embedded 135 M model, then on data/sample_*.parquet:
  1. trains LoRA with --backend fsdp           -> $OUT/fsdp
  2. trains the same with --backend zero3      -> $OUT/zero3
  3. merges the best checkpoint of the first   -> $OUT/fsdp/merged
  4. prints the validation losses before and after, and one prompt answered by the base and by the merged model.
Rerun it to continue after an interruption; delete $OUT to start over.

  OUT=folder             where the runs go (default out/quickstart)
  MODEL=folder           another model (a folder with safetensors, or a name of the Hugging Face Hub)
  NPROC=number           processes (default: 2, or 1 where there is one GPU)
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
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
nproc=${NPROC:-$((gpus == 1 ? 1 : 2))}

flags=(
    --model "$MODEL"
    --train_files data/sample_train.parquet --val_files data/sample_val.parquet
    --lora_rank 16 --lora_alpha 32 --train_batch_size 8 --lr 1e-3
    --validate_before_training
)

# Quiet launchers: torchrun warns if OMP_NUM_THREADS is not set (1 is its default too), deepspeed if there is no GPU.
[[ $gpus -eq 0 ]] && export DS_ACCELERATOR=cpu
echo "== training with fsdp, processes: $nproc"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc_per_node "$nproc" dsft/train.py --backend fsdp "${flags[@]}" --output_dir "$OUT/fsdp"

echo "== training with zero3, processes: $nproc"
deepspeed --log_level error --num_accelerators "$nproc" dsft/train.py --backend zero3 "${flags[@]}" --output_dir "$OUT/zero3"

if [[ ! -d "$OUT/fsdp/merged" ]]; then
    echo "== merging the best checkpoint"
    python -m dsft.merge --checkpoint "$OUT/fsdp"
fi

echo "== result"
python scripts/quickstart_report.py "$OUT" "$MODEL"

cat <<EOF

== next: your own rows, a parquet file with the columns prompt and response (docs/data.md has other forms)
    .venv/bin/python -m dsft.train --model $MODEL --train_files my_rows.parquet --output_dir out/mine \\
        --train_batch_size 8 --total_epochs 3 --lr 1e-3
    .venv/bin/python -m dsft.merge --checkpoint out/mine
EOF
