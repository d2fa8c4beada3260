#!/usr/bin/env bash
# A new user's first hour, from the installed package to a page about two runs, by the README's commands:
#
#   examples/first_hour.sh OUT                                                      the demo's model and data
#   examples/first_hour.sh OUT CHECKPOINT TRAIN.jsonl DEV.jsonl [options of fit]    yours: a template, a class, ...
#
# `make demo` installs the demo's model and data. STEPS (40), RATE and LORA_RATE (1e-5, 1e-4) are environment variables.
# It stops at the first command that does not do what is said above it.
set -euo pipefail

out=${1:?"usage: examples/first_hour.sh OUT [CHECKPOINT TRAIN.jsonl DEV.jsonl [options of fit]]"}
read -ra zo <<<"${ZO:-zo-offload}"
python=${PYTHON:-python}
steps=${STEPS:-40}
mkdir -p "$out"
if [ $# -gt 1 ]; then
    model=$2 train=$3 dev=$4
    options=("${@:5}")
else
    "$python" "$(dirname "$0")/demo_assets.py" "$out"
    model=$out/model train=$out/train.jsonl dev=$out/test.jsonl
    options=(--model-class AutoModelForSequenceClassification --max-length 32)
fi

say() { echo && echo "# $*   [after $SECONDS s]"; }
run() { echo "\$ $*" && "$@"; }
fails() { echo "error: $*" >&2 && exit 1; }

say "What is installed"
run "${zo[@]}" doctor

say "The data as the model will see it; no weights are read"
run "${zo[@]}" fit "$model" --data "$train" --dry-run "${options[@]}"

say "What a step will cost"
run "${zo[@]}" plan "$model"

say "Training from disk. Stopping it (Ctrl-C; here SIGTERM, as clusters send it, after the third step) loses nothing"
fit=("${zo[@]}" fit "$model" --data "$train" --eval-data "$dev" --offload disk --run-dir "$out/all" --steps "$steps"
    --eval-every "$((steps / 2))" --batch-size 8 --lr "${RATE:-1e-5}" --out "$out/tuned" "${options[@]}")
echo "\$ ${fit[*]} &"
"${fit[@]}" &
pid=$!
until [ "$(grep -c '"loss"' "$out/all/metrics.jsonl" 2>/dev/null || true)" -ge 3 ] 2>/dev/null; do
    kill -0 $pid 2>/dev/null || break
    sleep 0.05
done
kill -TERM $pid 2>/dev/null || true
code=0 && wait $pid || code=$?
if [ $code = 143 ]; then
    say "It ended after a step (exit code 143, as of SIGTERM), and goes on to the same bits"
    run "${zo[@]}" fit "$out/all" --resume --out "$out/tuned"
elif [ $code != 0 ]; then
    fails "fit ended with $code"
fi

say "Before and after, on rows that it was not trained on"
run "${zo[@]}" eval "$model" --data "$dev" "${options[@]}"
run "${zo[@]}" eval "$out/all" --data "$dev"

say "The journal and the base give the same weights again, bit for bit"
run "${zo[@]}" replay "$model" "$out/all/journal.zoj" --out "$out/again"
for file in "$out"/tuned/*.safetensors; do
    run cmp "$file" "$out/again/$(basename "$file")"
done

say "An adapter on a base in four bits; peft loads it"
run "${zo[@]}" fit "$model" --data "$train" --eval-data "$dev" --offload disk --lora 4 --storage int4 \
    --run-dir "$out/lora" --steps "$steps" --batch-size 8 --lr "${LORA_RATE:-1e-4}" --out "$out/adapter" "${options[@]}"
run "$python" -c "import sys; from peft import PeftConfig; print(PeftConfig.from_pretrained(sys.argv[1]))" "$out/adapter"

say "Both runs on one page"
run "${zo[@]}" report "$out/all" "$out/lora" --examples 4 --out "$out/report.html" --overwrite
