# What this cluster wants: the only file here to edit. Every job reads it, and so do chain.sh and `titans-pretrain submit` before they
# submit. To keep it elsewhere: export TITANS_SITE=/path/to/site.sh.

# Of what chain.sh and `titans-pretrain submit` submit, unless they are told otherwise; sbatch by itself takes --partition, --account.
#export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project

# Where titans-pretrain is, unless it is on PATH when you submit: Slurm hands your environment to the job.
#source /shared/titans/.venv/bin/activate

# Or a container, as a command before every command ...
#container=(apptainer exec --nv --bind /shared /shared/titans.sif)
# ... or as options of srun.
#srun_options=(--container-image=/shared/titans.sqsh --container-mounts=/shared:/shared)

# The network between the nodes, where the right interface is not found by itself.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
