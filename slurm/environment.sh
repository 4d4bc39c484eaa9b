# Sourced by pretrain.sbatch and sweep.sbatch on the first node of a job: enters the Python environment, or sees to it
# that the job is tried elsewhere.

venv=${DLM_VENV:-.venv}
if [ -e "$venv/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
fi

# This task goes back into the queue, and neither it nor the array's other tasks come to this node again. Where that
# happens on a second node, the environment is more likely to be wrong than the nodes, and all are held.
try_elsewhere() {
    local task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    local broken=slurm-$SLURM_ARRAY_JOB_ID.broken_nodes
    trap '' TERM # SLURM ends a job that goes back into the queue, and grants the time that the rest here takes
    echo "$SLURMD_NODENAME" >> "$broken"
    if [ "$(sort -u "$broken" | wc -l)" -gt 1 ]; then
        scontrol requeuehold "$task" || true
        scontrol hold "$SLURM_ARRAY_JOB_ID" || true
        echo "not the first such node ($broken): all tasks are held until scontrol release $SLURM_ARRAY_JOB_ID" >&2
        return
    fi
    local before
    before=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$before" != "(null)" ] || before=
    scontrol requeue "$task" || true
    # Fails for those tasks that do not wait.
    scontrol update "JobId=$SLURM_ARRAY_JOB_ID" "ExcNodeList=${before:+$before,}$SLURMD_NODENAME" || true
    scontrol update "JobId=$task" "ExcNodeList=${before:+$before,}$SLURMD_NODENAME" || true
    echo "the jobs to come are kept off $SLURMD_NODENAME; this one is among them" >&2
}

# What the chain needs of an installation.
if ! python -c 'import dlm_dist.config, dlm_dist.training.lease, launcher.cli'; then
    echo "Python does not run on $SLURMD_NODENAME: is $venv there?" >&2
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || try_elsewhere
    exit 1
fi
