#!/usr/bin/env bash
# Everything there is to learn on one GPU, in at most 9 minutes, the most important first:
#
#     benchmarks/gpu_round.sh                          results in benchmarks/results/gpu_round, or in $OUT
#     PEER_PYTHON=ENV/bin/python benchmarks/gpu_round.sh --minutes 9
#     benchmarks/gpu_round.sh --tiny                   on a CPU, to see that it runs to its end
#
# Results are written as they come; it can be stopped at any time. What each part is: benchmarks/gpu_round.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_round.py "$@"
