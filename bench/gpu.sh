#!/usr/bin/env bash
# The tests that need a GPU, then the bench suite with the shape of an 8B Llama and random weights, on one card.
#
#   bench/gpu.sh            result files go to bench/results, what everything printed to bench/results/gpu.log
#
# Needs torch, transformers and peft as they are there. What else lorafold and its tests import (the dependencies in
# pyproject.toml, pytest, pytest-timeout, hypothesis, and what these need) is taken from the wheels in the folder that
# WHEELS names (.wheels unless it does), if there is one, without a network. Each part has its own time limit, all
# together less than eight minutes; one that fails or takes too long does not keep the others from running.
# DEVICE=cpu SHAPE=tiny tries the script itself where there is no GPU; parts may take too long there.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${WHEELS:-.wheels} device=${DEVICE:-cuda} shape=${SHAPE:-8b}
python=${PYTHON:-python3} log=bench/results/gpu.log
site=$(mktemp -d) failed=()
trap 'rm -rf "$site"' EXIT

if compgen -G "$wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="$PWD/server:$PWD/plugin:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p bench/results

part() { # seconds, then a command
  local seconds=$1 start=$SECONDS status
  shift
  echo "== $*" | tee -a "$log"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  echo "== status $status after $((SECONDS - start)) s" | tee -a "$log"
  [ "$status" = 0 ] || failed+=("$* ($status)")
}

: > "$log"
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' |
  tee -a "$log"
part 90 "$python" -m pytest -q -p no:cacheprovider tests/test_kernels.py tests/test_paged_attention.py \
  tests/test_paged_prefill.py tests/test_two_path.py tests/test_two_path_static.py tests/test_attention_means.py \
  tests/test_families.py tests/test_fold.py tests/test_undo.py
part 30 "$python" -m bench.exactness --quick --device "$device" --record
part 25 "$python" -m bench.swap --quick --device "$device" --record
part 110 "$python" -m bench.overhead --device "$device" --shape "$shape" --dtypes bfloat16 --targets all --ranks 16 \
  --batches 1,8,32 --adapters 1,8 --seconds 3 --record
part 165 "$python" -m bench.throughput --device "$device" --shape "$shape" --batches 1,8,32 --prompts 64 --seconds 8 \
  --no-grpc --record
part 40 "$python" -m bench.metering --quick --device "$device" --shape "$shape" --record
echo "== ${#failed[@]} of 6 parts failed, ${SECONDS} s" | tee -a "$log"
printf '   %s\n' "${failed[@]}" | tee -a "$log"
[ "${#failed[@]}" = 0 ]
