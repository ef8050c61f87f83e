#!/usr/bin/env bash
# Medical SFT as DoctorAgent-RL does it (7 B model, LoRA 64, long multi-turn rows), then merge of the best checkpoint.
set -uo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" || $# -lt 2 ]]; then
    cat <<EOF
bash scripts/finetune_lora_med.sh NPROC SAVE_DIR [flags of dsft.train…]

  NPROC      processes on this machine, one a GPU
  SAVE_DIR   the run's folder; the merged model goes to SAVE_DIR/merged

  MODEL        default Qwen/Qwen2.5-7B-Instruct
  TRAIN_FILES  default data/MTMedDialog_sft_train.parquet
  VAL_FILES    default data/MTMedDialog_sft_val.parquet (data/README.md says where both come from)

Later flags win over those of this script: bash scripts/finetune_lora_med.sh 8 out/med --backend zero3 --lr 5e-5
The exit status is that of the training where it failed, else that of the merge.
EOF
    [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]] && exit 0
    exit 1
fi
nproc=$1
save_dir=$2
shift 2
if ! [[ "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC must be an int of at least 1, got '$nproc'" >&2
    exit 1
fi
case "$save_dir" in
/*) ;;
*) save_dir=$PWD/$save_dir ;;
esac
cd "$(dirname "$0")/.." || exit 1
[[ -x .venv/bin/python ]] && PATH="$PWD/.venv/bin:$PATH"

torchrun --standalone --nproc_per_node "$nproc" dsft/train.py \
    --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" \
    --train_files "${TRAIN_FILES:-data/MTMedDialog_sft_train.parquet}" \
    --val_files "${VAL_FILES:-data/MTMedDialog_sft_val.parquet}" \
    --prompt_key prompt --response_key response \
    --max_length 6784 --truncation right \
    --lora_rank 64 --lora_alpha 32 --target_modules all-linear \
    --train_batch_size 128 \
    --lr 1e-4 --total_epochs 3 \
    --output_dir "$save_dir" "$@"
status=$?
if [[ $status -ne 0 ]]; then
    echo "error: training ended with status $status; not merged" >&2
    exit $status
fi
if [[ -d "$save_dir/merged" ]]; then
    echo "$save_dir/merged already exists and is kept"
    exit 0
fi
python -m dsft.merge --checkpoint "$save_dir"
