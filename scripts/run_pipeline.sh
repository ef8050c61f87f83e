#!/usr/bin/env bash
# A game from nothing to an evaluated model: expert data by search, training, merge of the best, validation by playing.
set -uo pipefail

usage() {
    cat <<EOF
bash scripts/run_pipeline.sh ENV [flags of dsft.pipeline…]

  ENV   frozenlake or sokoban

Takes the flags of scripts/pipeline_ENV_gpu.yaml where nvidia-smi lists a GPU, else of scripts/pipeline_ENV_cpu.yaml;
flags on this command line win:

  bash scripts/run_pipeline.sh frozenlake --backend zero3 --train.lr 5e-4 --output_dir out/lake

Everything goes to --output_dir (default out/ENV): data, train, merged, validate, logs, report.html, report.md.
Started again, it goes on with what is left; --force STEP goes back to a step. All flags: docs/flags.md

  CONFIG=file.yaml     other defaults
  NPROC=number         processes (default: one a GPU, else 1)
  PYTHON, DSFT_TORCH   for the set-up, as in scripts/quickstart.sh
EOF
}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi
env=${1:-}
if [[ "$env" != "frozenlake" && "$env" != "sokoban" ]]; then
    echo "error: ENV must be frozenlake or sokoban, got '$env'; see --help" >&2
    exit 1
fi
shift
config=${CONFIG:-}
[[ -n "$config" ]] && config=$(realpath "$config")
cd "$(dirname "$0")/.." || exit 1
source scripts/setup_env.sh
setup_env requirements.txt || exit 1
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU)
[[ -n "$config" ]] || config=scripts/pipeline_${env}_$([[ "$gpus" -gt 0 ]] && echo gpu || echo cpu).yaml
exec python -m dsft.pipeline --env "$env" --config "$config" --output_dir "out/$env" \
    --nproc "${NPROC:-$((gpus > 0 ? gpus : 1))}" "$@"
