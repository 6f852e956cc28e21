#!/usr/bin/env bash
# PyTorch 2.15.0 on Linux: after each parallel operator the threads of the OpenMP that its wheels
# bring stay awake, on their CPUs, for milliseconds. Another library's threads in the same process
# find these CPUs taken: work that alternates with PyTorch's operators gets about half a CPU less
# for each of its threads beside the first. OMP_WAIT_POLICY=PASSIVE, set before Python starts, ends
# that, and makes PyTorch's own small operators slower, as their threads have to be woken up.
# Seen: a process with two threads that sleeps for 50 ms after an operator uses 3 to 5 ms of
# processor time meanwhile; with OMP_WAIT_POLICY=PASSIVE less than 0.2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat > "$folder/asleep.py" <<'PYTHON'
import time

import torch

torch.set_num_threads(2)
numbers = torch.randn(1 << 20)
used = []
for _ in range(21):
    numbers.exp()
    start = time.process_time()
    time.sleep(0.05)
    used.append((time.process_time() - start) * 1e3)
print(sorted(used)[10])
PYTHON
unset OMP_WAIT_POLICY GOMP_SPINCOUNT
active=$("$folder/venv/bin/python" "$folder/asleep.py")
passive=$(OMP_WAIT_POLICY=PASSIVE "$folder/venv/bin/python" "$folder/asleep.py")
echo "processor time while asleep for 50 ms: $active ms; with OMP_WAIT_POLICY=PASSIVE $passive ms"
python3 -c "import sys; sys.exit(not (float(sys.argv[1]) > 1 > 5 * float(sys.argv[2])))" "$active" "$passive"
