#!/bin/bash
#SBATCH --array=0-7 --nodes=1 --gpus-per-node=8 --signal=B:TERM@60
# A teacher behind servers on Slurm: every task is a vLLM with the GPUs of a node, and a worker that asks it.
#
#     CACHE=s3://bucket/train MODEL=/models/big-fp8 sbatch served_slurm.sh
#
# Workers take free shards, so tasks may come, go and be started again. The engine has an environment of its own.
: "${CACHE:?the cache with the token stream}" "${MODEL:?what the engine serves}" "${NAME:=big}"
: "${VLLM:=/envs/vllm/bin/vllm}" "${CACHE_LOGITS:=/envs/logit-cache/bin/cache-logits}" "${GPUS:=8}"
: "${K:=64}" "${CONTEXT:=2048}"
port=$((8000 + SLURM_ARRAY_TASK_ID)) # two tasks may share a node

"$VLLM" serve "$MODEL" --host 127.0.0.1 --port $port --served-model-name "$NAME" --tensor-parallel-size "$GPUS" \
    --max-logprobs "$K" --max-model-len $((CONTEXT + 2)) &
server=$!
# It waits for the server while that loads.
"$CACHE_LOGITS" --cache "$CACHE" --teacher http://127.0.0.1:$port/v1 --name "$NAME" -k "$K" --targets topk \
    --context-tokens "$CONTEXT" --patience-seconds 1800 &
job=$!
trap 'kill -TERM $job' TERM # shards that can be finished are committed
wait $job
status=$?
[ $status -gt 128 ] && wait $job && status=$?
kill $server
exit $status
