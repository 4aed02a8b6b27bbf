#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: build, tests, sanitizer, benchmarks, profile; a short table last.
#
#   bench/gpu.sh [--only OP] [--stage build,tests,sanitizer,bench,profile]
#
# OUT    folder of the results and of the full log; default bench/results/<device>
# PYTHON the interpreter that has PyTorch; default python3
#
# Clocks and every other setting of the card stay as they are.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
only=""
stages=build,tests,sanitizer,bench,profile
while (($#)); do
  case $1 in
    --only) only=${2:?--only needs an op}; shift 2 ;;
    --stage) stages=${2:?--stage needs names}; shift 2 ;;
    *) echo "usage: bench/gpu.sh [--only OP] [--stage build,tests,sanitizer,bench,profile]" >&2; exit 2 ;;
  esac
done
for stage in ${stages//,/ }; do
  [[ " build tests sanitizer bench profile " == *" $stage "* ]] || { echo "unknown stage: $stage" >&2; exit 2; }
done

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
read -r slug arch < <("$python" -c '
import torch
from bench.environment import describe
device = torch.device("cuda", 0)
print(describe(device)["slug"], "".join(map(str, torch.cuda.get_device_capability(device))))
') || { echo "no CUDA device, or PyTorch does not see it" >&2; exit 2; }
OUT=${OUT:-bench/results/$slug}
mkdir -p "$OUT"
log=$OUT/gpu.log
: >"$log"
rows=()
failed=0

# step NAME COMMAND...: runs it into the log; a table row says how it went.
step() {
  local name=$1 begin=$SECONDS verdict=ok
  shift
  echo "==== $name: $*" | tee -a "$log"
  "$@" >>"$log" 2>&1 || { verdict="FAILED ($?)"; failed=1; tail -n 30 "$log"; }
  rows+=("$(printf '%-22s %-14s %5ds  %s' "$name" "$verdict" $((SECONDS - begin)) "$(tail -n 1 "$log" | cut -c1-90)")")
}

skip() {
  rows+=("$(printf '%-22s %-14s %5s   %s' "$1" skipped - "$2")")
}

has_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

wanted() {
  [[ ,$stages, == *,$1,* ]]
}

if wanted build; then
  step build env DGM_CUDA=1 DGM_CUDA_ARCHS="${DGM_CUDA_ARCHS:-$arch}" "$python" setup.py build_ext --inplace
  step backends "$python" -c 'import dgm_kernels; print(dgm_kernels.backends())'
fi

if wanted tests; then
  if has_module pytest; then
    targets=(tests)
    [[ -z $only ]] || targets=(tests/test_"$only"*.py tests/test_every_op_gpu.py)
    step tests "$python" -m pytest "${targets[@]}" -m gpu -q
  else
    skip tests "pytest is not installed"
  fi
fi

if wanted sanitizer; then
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      # Without the caching allocator a tensor's end is an allocation's end, which is what memcheck watches.
      step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --target-processes all "$python" -m bench.run_once --small ${only:+--only "$only"}
    done
  else
    skip sanitizer "compute-sanitizer is not on the PATH"
  fi
fi

if wanted bench; then
  if has_module pytest_benchmark; then
    step bench "$python" -m pytest "bench${only:+/bench_$only.py}" --device cuda -q --benchmark-only \
      --benchmark-json="$OUT/benchmark.json"
  else
    skip bench "pytest-benchmark is not installed"
  fi
  if ! has_module matplotlib; then
    skip report "matplotlib is not installed: run python -m bench.report on benchmark.json elsewhere"
  elif [[ -f $OUT/benchmark.json ]]; then
    step report "$python" -m bench.report "$OUT/benchmark.json" --out "$OUT"
  fi
fi

if wanted profile; then
  step profile "$python" -m bench.profile_gpu ${only:+--only "$only"} --out "$OUT/profile.txt"
  if command -v ncu >/dev/null; then
    step ncu ncu --clock-control none --profile-from-start off --target-processes all --log-file "$OUT/ncu.txt" \
      "$python" -m bench.run_once ${only:+--only "$only"}
  else
    skip ncu "ncu is not on the PATH"
  fi
fi

[[ -f $OUT/results.md ]] && wanted bench && grep '^|' "$OUT/results.md"
printf '\n%s, results and full log in %s\n' "$slug" "$OUT"
printf '%s\n' "${rows[@]}"
exit "$failed"
