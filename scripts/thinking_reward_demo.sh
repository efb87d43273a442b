#!/usr/bin/env bash
# The thinking reward model on the demo, end to end with real processes: traces -> annotate (a rule-based judge over HTTP) -> balance
# -> train a tiny judge -> serve it by vLLM -> evaluate on held-out pictures -> a short Trust-GRPO run that asks it by URL.
#   bash scripts/thinking_reward_demo.sh            everything under runs/thinking_reward_demo, about as long as `make demo`
# OUT, DATA, MODEL (a warm-started tiny model), TRACES, STEPS, RL_STEPS, PYTHON may be set; what DATA and MODEL name is made where it is missing.
# SAMPLES may name a run's samples.jsonl, whose responses are then annotated too.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/thinking_reward_demo}
DATA=${DATA:-data/demo}
MODEL=${MODEL:-models/demo}
TRACES=${TRACES:-24000}
STEPS=${STEPS:-1200}
RL_STEPS=${RL_STEPS:-3}
SAMPLES=${SAMPLES:-}
TEMPLATE=demo_judge_rationale
# servers are started without it, or $! would be a shell around them
run() { "$PYTHON" -m sophiavl_fast "$@"; }
REGISTRY=data.registry=$DATA/dataset_info.json
mkdir -p "$OUT"

servers=()
finish() { for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; done; }
trap finish EXIT
# started FILE PID: the URL that a server's output names, once it is there
started() {
    until url=$(grep -om1 'http://127.0.0.1:[0-9]*/v1' "$1"); do
        kill -0 "$2" 2>/dev/null || { echo "the server ended: $(tail -3 "$1")" >&2; exit 1; }
        sleep 0.5
    done
    echo "$url"
}

[ -f "$DATA/dataset_info.json" ] || "$PYTHON" -m sophiavl_fast.data.demo --out "$DATA" --model "$MODEL-init"
[ -f "$MODEL/config.json" ] || run train configs/demo_warmup.yaml "$REGISTRY" run.dir="$OUT/warmup" run.export="$MODEL" model.path="$MODEL-init"

echo "== traces with known flaws, right and wrong answers alike; held-out ones with two kinds that training never shows"
"$PYTHON" -m sophiavl_fast.data.demo.corrupted --data "$DATA" --out "$OUT/traces.jsonl" --count "$TRACES"
"$PYTHON" -m sophiavl_fast.data.demo.corrupted --data "$DATA" --out "$OUT/labels.jsonl" --count 1000 --held-out
if [ -n "$SAMPLES" ]; then cat "$SAMPLES" >> "$OUT/traces.jsonl"; fi

OPENAI_API_KEY=$(head -c 24 /dev/urandom | base64 | tr -d '+/=')
export OPENAI_API_KEY
echo "== annotate"
"$PYTHON" -m sophiavl_fast.data.demo.judge_server --data "$DATA" > "$OUT/rule_judge.log" & servers+=($!)
url=$(started "$OUT/rule_judge.log" $!)
run reward annotate --input "$OUT/traces.jsonl" --out "$OUT/scored.jsonl" --url "$url" --model rule-judge --template $TEMPLATE --keep-replies

echo "== balance"
rm -rf "$OUT/balanced"
run reward balance --input "$OUT/scored.jsonl" --out "$OUT/balanced" --template $TEMPLATE --maximum 8000 --rationale

echo "== train"
run train configs/demo_judge_traces.yaml data.registry="$OUT/balanced/dataset_info.json" model.path="$MODEL" run.dir="$OUT/train" run.export="$OUT/judge" \
    run.steps="$STEPS" run.resume=never

echo "== serve and evaluate"
"$PYTHON" -m sophiavl_fast reward serve "$OUT/judge" --port 0 --template $TEMPLATE --log "$OUT/serve.log" > "$OUT/serve.out" & servers+=($!)
url=$(started "$OUT/serve.out" $!)
run reward evaluate --input "$OUT/labels.jsonl" --url "$url" --model thinking-reward-model --template $TEMPLATE --out "$OUT/result.json"

if [ "$RL_STEPS" -gt 0 ]; then
    echo "== Trust-GRPO that asks the judge by URL"
    run train configs/demo.yaml "$REGISTRY" model.path="$MODEL" run.dir="$OUT/rl" run.steps="$RL_STEPS" run.resume=never rollout.prompts_per_step=8 eval.every=0 \
        thinking.backend=endpoint thinking.url="$url" thinking.model=thinking-reward-model thinking.template=$TEMPLATE thinking.on_error=fail
fi
echo "done: $OUT/result.json, $OUT/result.calibration.png, $OUT/balanced/card.md"
