"""What a layout needs of each process and how long its steps take: the planner behind `tools/plan_run.py`."""
