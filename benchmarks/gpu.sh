#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, on the first one it meets:
#
#     bash benchmarks/gpu.sh --student STUDENT --data_dir DATA --out FOLDER
#
# Each part takes under ten minutes and writes FOLDER/<part>.txt, whose last line is JSON; FOLDER/tables.md has them
# together. Parts: tests launches compile train_plain train_packed train_compiled evaluation profile losses (all by
# default, as `--parts "tests losses"`). A part that fails does not stop the others. `--device cpu` tries the script.
# Needs no network: a student folder without weights gets random ones.
set -u
here=$(cd "$(dirname "$0")" && pwd)
student=google/t5-v1_1-base data_dir=data out=gpu-results device=cuda batch_size=64 steps=20 pairs=5 loss_steps=200
python=python parts="tests launches compile train_plain train_packed train_compiled evaluation profile losses"
while [ $# -gt 0 ]; do
    case "$1" in
    --student | --data_dir | --out | --device | --batch_size | --steps | --pairs | --loss_steps | --parts | --python)
        [ $# -gt 1 ] || { echo "gpu.sh: error: $1 needs a value" >&2; exit 2; }
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
    *)
        echo "gpu.sh: error: unknown option $1" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
common=(--data_dir "$data_dir" --student "$student" --batch_size "$batch_size" --device "$device")
peak=()
# dense bf16, as their maker states
nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | grep -Eq 'H100|H200' && peak=(--peak_tflops 989)
timed=("${common[@]}" ${peak[@]+"${peak[@]}"} --steps "$steps" --pairs "$pairs")
measured() { "$python" "$here/gpu.py" "$@" "${common[@]}"; }

part() {
    case "$1" in
    tests) (cd "$here/.." && "$python" -m pytest -q -n 0 -m gpu tests) ;;
    launches) "$python" "$here/launches.py" --student "$student" --batch_size "$batch_size" --data_dir "$data_dir" ;;
    compile) measured compile --steps "$steps" --pairs 1 ;;
    train_plain | train_packed | train_compiled)
        "$python" "$here/train_throughput.py" "${timed[@]}" --fast "${1#train_}" ;;
    evaluation) "$python" "$here/eval_throughput.py" "${timed[@]}" ;;
    profile) measured profile --steps "$steps" --pairs 1 ;;
    losses) measured losses --steps "$loss_steps" --pairs 1 ;;
    *)
        echo "gpu.sh: error: there is no part $1" >&2
        return 2
        ;;
    esac
}

failed=0
for name in $parts; do
    echo "== $name"
    part "$name" >"$out/$name.txt" 2>&1
    code=$?
    echo "exit code $code" >"$out/$name.code"
    [ $code -eq 0 ] || { failed=1; tail -n 3 "$out/$name.txt"; }
done
"$python" "$here/gpu.py" tables --out "$out"
exit $failed
