# What the jobs share; the templates read it. Nothing to edit here: see site.sh.
set -uo pipefail
container=() srun_options=()
source "${TITANS_SITE:-$titans_slurm/site.sh}" || exit 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

step() { # step [option of srun ...] -- COMMAND ...: runs a command as a step of the job, in the container if there is one
    local options=()
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" "${options[@]}" "${container[@]}" "$@"
}

check_nodes() { # check_nodes ARGUMENTS of `titans-pretrain check-node`: fails where a node is not fit; prints the job's folder
    step --nodes=1 --ntasks=1 --ntasks-per-node=1 -- titans-pretrain check-node "$@" | tail -n 1 || return # a bad config is told once
    [ "$SLURM_NNODES" -eq 1 ] || # --wait: all of them have time to say what they lack
        step --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=30 -- titans-pretrain check-node "$@" >/dev/null
}
