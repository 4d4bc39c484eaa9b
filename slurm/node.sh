#!/bin/bash
# On every node of a job: its ranks (launcher/node.py), or a record of why there are none. Where Python is broken on one
# node, srun may end the others before they have left a record, and nobody would know whom to blame.
ended=
trap : USR1 # signals reach every process of a step; what they mean is the launcher's to decide
trap ended=1 TERM INT
python -m launcher.node "$@"
status=$?
record=${DLM_LOG_DIR:-logs}/node-$SLURMD_NODENAME.json
if [ $status -ne 0 ] && [ -z "$ended" ] && [ ! -e "$record" ]; then
    mkdir -p "${record%/*}"
    printf '{"node": "%s", "status": %d, "told": "the launcher does not start: is the Python environment there?"}\n' \
        "$SLURMD_NODENAME" $status > "$record"
fi
exit $status
