#!/usr/bin/env bash
# PyTorch 2.15.0: the functions of torch.distributed.nn.functional have `group=group.WORLD` as their
# default, which Python evaluates when the module is imported. Where that is after
# init_process_group, the group of that moment is kept for good: destroy_process_group succeeds, and
# the group's gloo threads and sockets live on to the end of the process, and after a second
# init_process_group the functions still mean the first group. DistributedDataParallel (by
# torch._dynamo) imports it that late in every ordinary program.
# Seen: threads named *gloo* that are left after destroy_process_group: 0 where the module was
# imported before the group was made, 3 where it was imported after, or the group had a
# DistributedDataParallel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat > "$folder/left.py" <<'PYTHON'
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

case = sys.argv[1]
if "before" in case:
    import torch.distributed.nn.functional
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
if "after" in case:
    import torch.distributed.nn.functional
if "parallel" in case:
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 4))
gc.collect()
dist.destroy_process_group()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
print(sum("gloo" in name for name in names))
PYTHON
seen=
for case in before after parallel before-parallel; do
    count=$("$folder/venv/bin/python" "$folder/left.py" $case "$folder/$case" 2> "$folder/errors" || cat "$folder/errors")
    echo "$case: $count threads left"
    seen="$seen $count"
done
[ "$seen" = " 0 3 3 0" ]
