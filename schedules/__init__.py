"""How a description is run: one file a target family, and the planner that chooses among their configs."""
