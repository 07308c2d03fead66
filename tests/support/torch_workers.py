"""The process that imports torch and our packages once, and forks every worker that a test kills, or joins to others as a rank."""

from __future__ import annotations

import torch
from support import export_workers, feature_workers, rank_workers, training_workers
from support.fork_server import Tasks, serve
from support.ranks import launcher

TASKS: Tasks = {**export_workers.TASKS, **feature_workers.TASKS, **training_workers.TASKS, "launch": launcher(rank_workers.TASKS)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    serve(TASKS)
