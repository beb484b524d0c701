#!/usr/bin/env bash
# The demo: pretrain EMO and a standard MoE through Megatron on real text, cut modules out, and compare their losses.
#
#     demo/demo.sh --quick        (demo/demo.sh --help lists the options; so does make demo ARGS=--help)
#
# Every step writes files to the output folder. A step whose files exist is skipped, so an interrupted demo resumes.
# When this script ends, for any reason, its steps end too: with EMO_PARENT the kernel stops them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

case " $* " in *" --help "* | *" -h "*) exec "$python" -m demo.recipe --help ;; esac
# sets $output, $processes, $steps, $models, $about and the environment of the steps
settings=$("$python" -m demo.recipe "$@")
eval "$settings"
export EMO_PARENT=$$ EMO_DEVICE=${EMO_DEVICE:-cpu} OMP_NUM_THREADS=1

exec {lock}> "$output/demo.lock"
if ! flock --nonblock $lock; then
    echo "error: another demo is running in $output: wait until that demo ends, or pass another folder with --output" >&2
    exit 2
fi

stop() { # asks running steps to end; the kernel stops the remaining ones when this script ends
    local status=$? children
    trap '' INT TERM HUP
    children=$(jobs -pr)
    [ -z "$children" ] || kill $children 2> /dev/null || true
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ -n "$(jobs -pr)" ] || break
        sleep 0.1
    done
    exit $status
}
trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# the shell handles a signal while it waits, but not while it runs a command in the foreground
in_front() { "$@" & wait $!; }

is_done() { # WHAT MODEL
    local tracker=$output/$2/checkpoint/latest_checkpointed_iteration.txt
    if [ "$1" = train ]; then
        [ -f "$tracker" ] && [ "$(cat "$tracker")" = "$steps" ]
    else
        [ -f "$output/$2/losses/measured.json" ]
    fi
}

start() { # WHAT MODEL
    local folder=$output/$2 command=("$root/examples/pretrain_emo.py") flags
    [ "$1" = train ] || command=("$root/demo/measure.py")
    mapfile -d '' flags < "$folder/$1.flags"
    "$python" "${command[@]}" "${flags[@]}" < /dev/null > "$folder/$1.log" 2>&1 &
    running[$!]="$1 $2"
    [ -t 1 ] || echo "$1 $2 ..."
}

show() { # prints the progress of all running steps in one line
    local line="" pid what
    for pid in "${!running[@]}"; do
        what=${running[$pid]}
        # a new log has no such line yet
        line+="$what $({ grep -o 'iteration *[0-9]*/ *[0-9]*' "$output/${what#* }/${what% *}.log" || true; } | tail -1 | tr -s ' ')   "
    done
    printf '\r\033[K%s' "${line:0:${COLUMNS:-80}}"
}

end() { # PID of a finished step: reports a failure, or queues the next step of the same model
    local what=${running[$1]} status=0
    wait "$1" || status=$?
    unset "running[$1]"
    if [ $status -ne 0 ]; then
        local log=$output/${what#* }/${what% *}.log
        echo "error: $what failed with exit code $status. Last lines of $log:" >&2
        # a rank's own traceback is more useful than the lines after it
        { grep '^\[rank' "$log" || cat "$log"; } | tail -15 >&2
        exit 1
    fi
    # evaluations are queued last: they run next to the last trainings
    [ "${what% *}" = evaluate ] || queue+=("evaluate ${what#* }")
}

in_front "$python" -m demo.corpus "$output"
echo "$about"
declare -A running=()
queue=()
for model in $models; do
    queue+=("train $model")
done
while [ $((${#queue[@]} + ${#running[@]})) -gt 0 ]; do
    while [ ${#queue[@]} -gt 0 ] && [ ${#running[@]} -lt "$processes" ]; do
        next=${queue[0]} queue=("${queue[@]:1}")
        if ! is_done $next; then
            start $next
        elif [ "${next% *}" = train ]; then
            queue+=("evaluate ${next#* }")
        fi
    done
    sleep 0.5
    [ ! -t 1 ] || show
    for pid in "${!running[@]}"; do
        kill -0 "$pid" 2> /dev/null || end "$pid"
    done
done
[ ! -t 1 ] || printf '\r\033[K'
in_front "$python" -m demo.findings "$output" $models
