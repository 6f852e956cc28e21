#!/usr/bin/env bash
# PyTorch 2.15.0: when torchrun starts its processes again after one was lost (--max-restarts), their
# store still has the keys that the lost ones have set, although each restart is said to bring a new
# one. Whatever waits for a key to appear finds the old one at once; gloo, which looks up its peers'
# addresses there, may try those of processes that are gone, and a counter goes on where it stood.
# Seen: the second start's processes count on from 2, to 3 and 4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat > "$folder/work.py" <<'PYTHON'
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

store, rank, _ = next(dist.rendezvous("env://"))
count = store.add("arrived", 1)
start = os.environ["TORCHELASTIC_RESTART_COUNT"]
Path(sys.argv[1], f"{start}-{rank}").write_text(str(count))
if start == "0":
    time.sleep(3)
    sys.exit(1)
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    --max-restarts 1 "$folder/work.py" "$folder" 2> /dev/null
echo "arrived, first start: $(cat "$folder/0-0") $(cat "$folder/0-1"), second: $(cat "$folder/1-0") $(cat "$folder/1-1")"
[ "$(cat "$folder/1-0")$(cat "$folder/1-1")" = 34 ] || [ "$(cat "$folder/1-0")$(cat "$folder/1-1")" = 43 ]
