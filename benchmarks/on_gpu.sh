#!/usr/bin/env bash
# Run the CUDA tests and the timings on this machine's GPU, in one go of at most 8 minutes.
#
#   benchmarks/on_gpu.sh
#   PYTHON=~/env/bin/python OUT=figures MINUTES=5 TEST_SECONDS=60 benchmarks/on_gpu.sh
#
# Nothing is installed. OUT (benchmarks/results) receives gpu.json, gpu_fused.json and the logs
# cuda_tests.log, gpu_fused.log and gpu.log. The exit status is 0, or 1 if tests failed, 2 if
# something could not be timed, 3 for both, and 4 if the package cannot run here: then the output
# says what to carry to this machine.
set -euo pipefail
started=$SECONDS

[[ -z ${OUT:-} ]] || OUT=$(realpath -m "$OUT")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
MINUTES=${MINUTES:-8}
TEST_SECONDS=${TEST_SECONDS:-180}
mkdir -p "$OUT"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# numba-cuda's compiler lies in a CUDA toolkit where no package brings it.
if [[ -z ${CUDA_HOME:-} ]] && command -v nvcc > /dev/null; then
  CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  export CUDA_HOME
fi

echo "== machine"
nvidia-smi || echo "nvidia-smi does not run here"
if ! timeout 120 "$PYTHON" benchmarks/gpu.py --probe; then
  echo "== nothing was run: see above"
  exit 4
fi

echo "== tests"
tests=0
timeout --signal=INT --kill-after=10 "$TEST_SECONDS" \
  "$PYTHON" -m pytest tests -k cuda -q -n 4 -p no:cacheprovider 2>&1 |
  tee "$OUT/cuda_tests.log" | tail -n 25 || tests=$?
case $tests in
  0) tests_say="passed" ;;
  5) tests_say="none were found" ;;
  124 | 137) tests_say="stopped after $TEST_SECONDS s" ;;
  *) tests_say="failed (status $tests)" ;;
esac
echo "== tests: $tests_say" | tee -a "$OUT/cuda_tests.log"

echo "== kernels with a softmax inside"
fused=0
timeout --signal=INT --kill-after=10 60 \
  "$PYTHON" benchmarks/gpu_fused.py --json "$OUT/gpu_fused.json" 2>&1 |
  tee "$OUT/gpu_fused.log" || fused=$?

echo "== times"
# A case takes up to half a minute: the last one must have ended before the time is up.
left=$((MINUTES * 60 - (SECONDS - started)))
minutes=$(awk -v left="$left" 'BEGIN { m = (left - 40) / 60; print (m > 0.5 ? m : 0.5) }')
times=0
timeout --signal=INT --kill-after=10 $((left > 60 ? left : 60)) \
  "$PYTHON" benchmarks/gpu.py --minutes "$minutes" --json "$OUT/gpu.json" 2>&1 |
  tee "$OUT/gpu.log" || times=$?

echo "== $((SECONDS - started)) s; tests $tests_say; times: status $times, $fused; see $OUT"
exit $(((tests != 0 ? 1 : 0) + (times != 0 || fused != 0 ? 2 : 0)))
