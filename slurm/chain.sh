#!/bin/bash
# From text to an exported model in one go: jobs that wait for each other. If one fails, those after it are cancelled.
usage='usage: slurm/chain.sh [--parts N] [--train "OPTIONS"] [--all "OPTIONS"] CORPUS TOKENIZER DATA_DIR CONFIG RUN EXPORTED [key=value ...]

  slurm/chain.sh --parts 16 --train "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8" \
      corpus/ tokenizer data configs/340m-mag.yaml runs/340m exported/340m train.global_batch=128

  --parts N          tokenize with an array of N jobs (default: 1)
  --train "OPTIONS"  of sbatch, for the training alone; for a cluster without GPUs "--gpus-per-node=0"
  --all "OPTIONS"    of sbatch, for every job'
set -euo pipefail
parts=1 train=() all=()
while [[ ${1:-} == --* ]]; do
    [ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
    case $1 in
    --parts) parts=$2 ;;
    --train) read -ra train <<<"$2" ;;
    --all) read -ra all <<<"$2" ;;
    *) echo "$usage" >&2; exit 2 ;;
    esac
    shift 2
done
if [ $# -lt 6 ] || ! [[ $parts =~ ^[1-9][0-9]*$ ]]; then
    echo "$usage" >&2
    exit 2
fi
corpus=$1 tokenizer=$2 data=$3 config=$4 run=$5 exported=$6
shift 6

TITANS_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TITANS_SLURM
container=() srun_options=()
source "${TITANS_SITE:-$TITANS_SLURM/site.sh}"

submit() { # submit TEMPLATE ...: after the job before it, which then is this one
    before=$(sbatch --parsable ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} "${all[@]}" "$@")
    before=${before%%;*} # a federation adds its cluster
}
before=
if [ "$parts" -eq 1 ]; then
    submit "$TITANS_SLURM/tokenize.sbatch" "$corpus" "$tokenizer" "$data"
    echo "tokenize  $before"
else
    submit --array="0-$((parts - 1))" "$TITANS_SLURM/tokenize.sbatch" "$corpus" "$tokenizer" "$data"
    echo "tokenize  $before ($parts parts)"
    submit "$TITANS_SLURM/merge.sbatch" "$data"
    echo "merge     $before"
fi
submit "${train[@]}" "$TITANS_SLURM/pretrain.sbatch" "$config" data.path="$data" run.dir="$run" "$@"
echo "pretrain  $before"
submit "$TITANS_SLURM/export.sbatch" "$run" "$exported"
echo "export    $before"
